"""The scenes that vision questions are about: what lies where, and how it is drawn."""
