"""The costs and savings of a plan: the dense model and the plan side by side.

Invariant: every number carries its sample size, and every difference is paired (both sides answer
the same examples, timings alternate). Quality, bytes and speed of one result come from one plan,
through the engine that serves. Rejected: judging answers by teacher-forced arg-max alone (it never
runs the decode that users get), and timing one side after the other (drift of the machine becomes a
speed-up).

``evaluate`` measures; ``table`` and ``report`` show its results.
"""
