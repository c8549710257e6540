"""Search methods replayed on spaces that were scored whole, so that the optimum is known."""
