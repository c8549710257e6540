"""The replicas' side of the service: servers over the engines, and leases on their slots.

Servers are plain classes that know no Ray; ``replicas`` wraps them for Serve.
"""
