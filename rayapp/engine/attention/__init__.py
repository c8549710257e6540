"""Attention over pages: one file per backend behind one small interface.

:mod:`rayapp.engine.attention.step` is the interface: where the KV of a step lies, as spans of rows
that one call can read. A backend is a function that attends over them for one block;
:mod:`rayapp.engine.attention.sdpa` runs on every device. A backend that reads scattered pages by
their numbers would be a file beside it.
"""
