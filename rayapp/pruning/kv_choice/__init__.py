"""Which KV of a plan travels, and in which encoding: sets of transfer rules, scored jointly.

Invariant: whole sets are scored with the block plan in place, because cuts that are harmless alone
destroy retrieval together.
"""
