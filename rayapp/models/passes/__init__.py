"""Passes of an engine over the blocks of a stage, without the machinery of modules.

:mod:`.single_token` runs one token of many sequences, :mod:`.many_tokens` the tokens of prompts.
Both are made of :mod:`.parts`, the norms, rotations and MLPs of plain blocks; their oracle is
:class:`rayapp.models.stack.BlockStack`, which calls the modules.
"""
