"""The demo: the whole loop in one go, on the shipped test-bed or on any model.

``loop`` runs search, evaluation, service and report on a local cluster. What differs from model to
model is a ``subject``: where its lines come from, and the sizes of all steps. ``testbed`` draws
questions with known answers; ``own_answers`` lets a model answer the shipped prompts itself.
"""
