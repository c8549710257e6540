"""The tables of a paper on pruning by block, for a user's own checkpoint and data.

``rows`` says which plans are compared, and how they are searched; ``outcome`` keeps the results of
one plan on every example; ``tables`` turns outcomes into numbers. Invariant: a number in a table
can be recomputed from the outcomes beside it, and every difference is paired, row against dense and
row against row. Rejected: keeping means only, from which no interval between two plans follows.
"""
