"""The search for the parts that each stage can do without, scored exactly as it will be served.

A candidate is a set of removed parts per stage; KV modes are derived, never searched. One
``score_many(candidates, chunks)`` serves every method. Its compute is in this process
(:class:`rayapp.pruning.evaluator.evaluator.Evaluator`) or on Ray
(:mod:`rayapp.distributed.evaluator_pool`); both give the same bits, because a (candidate, chunk)
pair is always computed with the same shapes.

Invariant: reuse never changes a score (:mod:`rayapp.pruning.evaluator.naive` is the oracle).
Rejected: batches of several candidates (their shapes, and so their bits, would depend on the
company), and methods that own the loop (ask and tell keep journal, resume and workers out of every
method).
"""
