"""Parts of ``ablation.py``; ``headline.py`` measures plans on the same bench."""
