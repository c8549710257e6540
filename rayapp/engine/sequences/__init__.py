"""Sequences that decode, and the pages of KV that they hold.

:mod:`.group` gives a sequence its pages in one group of blocks, :mod:`.paged_kv` puts the groups
of a stage together, and :mod:`.running` is a sequence itself. A slot is a place in the batch and
holds no memory of its own.
"""
