"""Parts of ``kv_rules.py``: ways to choose which KV travels, ours and others, and their judge."""
