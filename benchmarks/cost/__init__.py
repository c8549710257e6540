"""Parts of ``search_cost.py``: what a search costs, and what its races find."""
