"""The loop of a search: ask a method, score, write down, tell; then the plan, or a front of plans.

Invariant: the journal holds every score before a method is told it, so a killed search, once
resumed, ends with the plan that it would have had undisturbed.
"""
