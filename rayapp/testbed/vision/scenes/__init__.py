"""The scenes that vision questions are about: the places of things, and their pictures."""
