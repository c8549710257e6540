"""Fingerprints of models: which weights, and which settings of their KV, a plan was made for.

A fingerprint is a digest of all tensors, whatever the number of files and the order in them, and of
the settings that decide what keys mean. It is kept beside a checkpoint, because reading all weights
takes long.
"""
