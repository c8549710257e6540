"""The measures of a model and of a plan: answers, choices, likelihood, perplexity, time, bytes.

Every file measures one quantity as EVALUATION defines it; :mod:`rayapp.evaluation.evaluate`
compares dense with plan. Invariant: a measure runs the stages that serving runs.
"""
