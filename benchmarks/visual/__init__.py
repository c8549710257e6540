"""Parts of ``visual_speed.py`` and ``visual_quality.py``; each page has the name of its script."""
