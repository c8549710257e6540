"""Measurements of a model by itself: influence, costs, gates, attention mass.

Every measure is a function of an evaluator, so any compute can run it
(:meth:`rayapp.pruning.scorer.Compute.measure`): in this process, or on an evaluator of a cluster.
"""
