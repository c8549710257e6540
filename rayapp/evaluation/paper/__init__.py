"""The tables of a paper on pruning by block, for a user's own checkpoint and data.

``presets`` lists the plans that are compared, and ``rows`` says how they come about; ``count`` says
what they will take. ``outcome`` keeps the results of one plan on every example, ``numbers`` and
``tables`` turn outcomes into numbers, and ``pictures`` draws them. Invariant: a number in a table
can be recomputed from the outcomes beside it, and every difference is paired, row against dense and
row against row. Rejected: keeping means only, from which no interval between two plans follows.
"""
