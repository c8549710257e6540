"""Healing of removed blocks: survivors that are trained, and linear maps in closed form.

The meaning of healing for a candidate (its pairs and fits) is data and lives with the candidates;
this room trains pairs, solves fits, and keeps their tensors.
"""
