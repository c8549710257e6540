"""Clusters: local ones of several nodes, connections to running ones, and their resources."""
