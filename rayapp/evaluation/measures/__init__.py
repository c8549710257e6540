"""The measures of a model and of a plan: answers, choices, likelihood, perplexity, time, bytes.

Every file measures one quantity as EVALUATION defines it; comparing dense with plan is
:mod:`rayapp.evaluation.evaluate`'s work. Invariant: a measure runs the stages that serving runs.
"""
