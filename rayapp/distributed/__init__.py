"""The floor that knows Ray: replicas, the KV channel, the ingress, search evaluators.

Servers are plain classes over the engines; only :mod:`rayapp.distributed.serve.app` binds them
into a Serve application. The ingress owns every KV reference, so no replica's death loses finished
work; every wait has a deadline, and every place, slot and byte is given back when its request ends.
Rejected: Serve's own disaggregation classes (they wrap vLLM and move KV outside the object store)
and one actor per request (a slot is a row of a batch, not a process).
"""
