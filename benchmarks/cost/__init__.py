"""Parts of ``search_cost.py``: the cost of a search, and the plans of its races."""
