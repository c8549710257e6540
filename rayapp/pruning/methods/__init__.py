"""Search methods, one file each, behind ask and tell (:mod:`rayapp.pruning.methods.method`).

Invariant: what a method asks depends on its settings and on the scores that it was told, nothing
else; randomness comes from (seed, generation, index). So a journal of scores replays a search
exactly.
"""
