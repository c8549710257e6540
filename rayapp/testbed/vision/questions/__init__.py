"""The questions about scenes, their words, and the files that hold them."""
