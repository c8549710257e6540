"""One file a command: its options, and the one function that it calls.

``rayapp X`` and ``python jobs/X.py`` are the same command, made of the same file.
"""
