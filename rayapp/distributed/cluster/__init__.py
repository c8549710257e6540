"""Clusters: local ones of several nodes, the connection to a running one, what is free on it."""
