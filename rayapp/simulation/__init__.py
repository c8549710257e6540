"""A simulator of the service: both pools and the link, from measured costs and a trace.

Events are discrete: a request arrives, a prefill step ends, KV has travelled, a sequence ends, a
replica is ready. Admission, routing, the plan of every prefill step and the sizes of the pools are
decided by the very functions that the service calls; only time is made of measured costs instead of
computation. An hour of a trace takes seconds.

A model of queueing formulas alone was rejected: chunks, slots, cold starts and the delay between a
report and a decision are what policies fail by, and formulas have none of them.
"""
