"""Workflows are the work of commands, from settings to files; they join the rooms below them.

A command's own file has only its options, so that ``rayapp X --help`` waits for neither torch nor
Ray. Invariant: Ray is imported only where a cluster is used: with ``workers=0`` and no address,
searches run on machines where Ray cannot be imported.
"""
