"""Candidates: a set of removed parts per stage, the space that they come from, and their healing.

Methods, searches and evaluators share these types; nothing here runs a model.
"""
