"""The questions about scenes, their words, and the files that store them."""
