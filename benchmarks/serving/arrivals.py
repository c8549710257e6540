"""Requests as they arrive: times and lengths, from a published trace or drawn like one."""

from __future__ import annotations

import random

from rayapp.simulation.traces import Arrival, at_rate, read_trace, scaled

__all__ = ["Arrival", "at_rate", "drawn", "read_trace", "scaled"]


def drawn(count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals, one a second, with skewed lengths; a stand-in where no trace is given."""
    rng, at_s, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        lengths = (int(rng.lognormvariate(mean, 0.9)) for mean in (6.5, 5.0))
        arrivals.append(Arrival(at_s, *lengths))
        at_s += rng.expovariate(1.0)
    return arrivals
