"""Prefill and decode replicas behind one ingress, as a Ray Serve application.

``ingress/`` conducts requests and owns KV references, ``replicas/`` run stages; both know the
messages, the KV channel and the settings of this folder. :mod:`rayapp.distributed.serve.app` is the
only place that binds deployments.
"""
