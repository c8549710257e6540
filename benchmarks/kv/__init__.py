"""Parts of ``kv_rules.py``: ways to choose KV, ours and others, and their judge."""
