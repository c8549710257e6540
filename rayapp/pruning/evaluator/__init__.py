"""Scores candidates on one chunk of calibration lines, and reuses the states that they share.

Invariant: reuse never changes a score; :mod:`rayapp.pruning.evaluator.naive` computes the same
scores without any reuse and is the oracle of the tests.
"""
