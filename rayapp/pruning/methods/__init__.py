"""Search methods, one file each, behind ask and tell (:mod:`rayapp.pruning.methods.method`).

Invariant: the candidates that a method asks for depend on its settings and on the scores that it
was told, and on nothing else; randomness comes from (seed, generation, index). So a journal of
scores replays a search exactly.
"""
