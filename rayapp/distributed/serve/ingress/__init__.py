"""The ingress's side of the service: attempts, the router, and the handling of lost replicas.

The ingress owns every KV reference, so a dead prefill replica loses no finished work.
"""
