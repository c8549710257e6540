"""How the comparison of visual pruning is shown."""
