"""The choice of the KV of a plan that travels, and of its encoding: jointly scored transfer rules.

Invariant: whole sets are scored with the block plan in place, because cuts that are harmless alone
destroy retrieval together.
"""
