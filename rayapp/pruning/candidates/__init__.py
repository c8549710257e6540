"""Candidates: a set of removed parts per stage, the space that they come from, and their healing.

Plain data without torch: methods, searches and evaluators share it.
"""
