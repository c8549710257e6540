"""An evaluation in pieces: the same numbers wherever and whenever a piece is computed.

Invariant: a piece is a fixed batch of examples, cut without regard to who computes it, and sums are
taken over examples in their own order; so one process, several evaluators and a resumed run agree
to the digit. Rejected: whole tasks as the unit (the slowest one decides, and a lost evaluator loses
an hour).
"""
