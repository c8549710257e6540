"""One file a command: its options, and the one function of :mod:`rayapp.workflows` that it calls.

``rayapp X`` and ``python jobs/X.py`` are the same command, made of the same file. Options come from
the settings models that they fill (:mod:`rayapp.commands.options`), so nothing is declared twice.
Nothing here imports torch or Ray before a command is called.
"""
