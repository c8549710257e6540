"""The commands, one per file: its options, and the function of :mod:`rayapp.workflows` to call.

``rayapp X`` and ``python jobs/X.py`` are the same command, made of the same file. Options come from
the settings models that they fill (:mod:`rayapp.commands.options`), so nothing is declared twice.
Nothing here imports torch or Ray before a command is called.
"""
