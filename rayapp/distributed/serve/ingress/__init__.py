"""The ingress's side of the service: attempts, the router, and what a lost replica means.

The ingress owns every KV reference, so a dead prefill replica loses nothing that it has finished.
"""
