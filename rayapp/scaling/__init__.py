"""Work in seconds, and what follows from it: admission, routing, and the sizes of pools.

Everything here is a pure function of plain numbers: no Ray, no torch, no clock. The service calls
these functions with what its replicas report; the simulator (:mod:`rayapp.simulation`) calls the
same ones with what its replicas would report, so a policy that is tried there is the one that runs.

One signal serves all three: the seconds that one replica would need for the work of a stage, queued
and running, at the rates that were measured. Tokens in a queue were rejected as a signal: a queue
of 4,096 tokens is half a second on one machine and a minute on another, and four busy replicas
without a queue looked as if one would do.
"""
