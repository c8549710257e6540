"""How long work waits for one of several replicas, and how many replicas keep it from waiting.

With the least work first, a pool is close to one queue with several servers, and the time that a
request waits there is known well enough from four numbers: the load (seconds of work that arrive
per second), the mean work of a request, how much it varies, and the number of servers. The share
that waits at all is Erlang's C; how long those wait is exponential, with a mean that grows with the
variation of work and of arrivals (Kingman's law of congestion, as Allen and Cunneen apply it to
several servers).
"""

from __future__ import annotations

import math

MOST = 10_000
"""Replicas beyond which nobody searches (project default)."""


def share_that_waits(load: float, num_replicas: int) -> float:
    """Share of requests that find every replica busy (Erlang's C); 1 if the load is too much.

    Args:
        load: Seconds of work that arrive per second.
        num_replicas: Number of replicas, at least one.
    """
    if load <= 0.0:
        return 0.0
    if load >= num_replicas:
        return 1.0
    blocked = 1.0
    for servers in range(1, num_replicas + 1):
        blocked = load * blocked / (servers + load * blocked)
    return blocked / (1.0 - load / num_replicas * (1.0 - blocked))


def share_too_late(
    load: float, num_replicas: int, mean_s: float, spread: float, limit_s: float
) -> float:
    """Share of requests that wait for longer than ``limit_s``.

    Args:
        load: Seconds of work that arrive per second.
        num_replicas: Number of replicas, at least one.
        mean_s: Mean work of a request, seconds.
        spread: Half the sum of the squared variations of arrivals and of work; 1 for Poisson
            arrivals of exponential work.
        limit_s: Longest wait that is not too late, seconds.
    """
    waiting = share_that_waits(load, num_replicas)
    if waiting in (0.0, 1.0):
        return waiting
    drained_s = mean_s * max(spread, 0.05) / (num_replicas - load)
    return waiting * math.exp(-max(limit_s, 0.0) / max(drained_s, 1e-9))


def replicas_in_time(
    load: float, mean_s: float, spread: float, limit_s: float, *, late: float, usage: float
) -> int:
    """The fewest replicas of which none is too busy, and at most a share ``late`` waits too long.

    Args:
        load: Seconds of work that arrive per second.
        mean_s: Mean work of a request, seconds.
        spread: Variation, as in :func:`share_too_late`.
        limit_s: Longest wait that is not too late, seconds.
        late: Share of requests that may wait for longer.
        usage: Share of the time that a replica may be busy at most.
    """
    if load <= 0.0:
        return 1
    fewest = max(1, math.ceil(load / usage - 1e-9))
    for num_replicas in range(fewest, MOST):
        if share_too_late(load, num_replicas, mean_s, spread, limit_s) <= late:
            return num_replicas
    return MOST
