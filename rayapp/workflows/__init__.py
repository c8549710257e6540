"""What commands do, from settings to files: the rooms below put together.

A command's own file holds its options only, so that ``rayapp X --help`` waits for neither torch nor
Ray. Invariant: Ray is imported where a cluster is used, and nowhere else: with ``workers=0`` and no
address, searches run where Ray cannot be imported.
"""
