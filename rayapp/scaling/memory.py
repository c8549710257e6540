"""What a policy remembers of a pool between two decisions, and the rates that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.view import Heard

Counter = Callable[[Heard], tuple[float, float, float] | None]
"""Reads three counters of a report that only grow: requests, seconds, and their squares."""

_MOST_DISPERSED = 4.0


@dataclass(frozen=True)
class Sample:
    """What arrived between two reports, per second: requests, work, and its squares."""

    at_s: float
    span_s: float
    requests: float
    work_s: float
    square_s: float


@dataclass(frozen=True)
class Rates:
    """What arrives at a pool.

    Args:
        fast: Work per second in the last seconds.
        slow: Work per second over a longer time.
        noise: Standard deviation of ``fast`` that chance alone explains.
        mean_s: Mean work of one request; 0 if nothing arrived.
        spread: Half the sum of the squared variations of arrivals and of work.
    """

    fast: float = 0.0
    slow: float = 0.0
    noise: float = 0.0
    mean_s: float = 0.0
    spread: float = 1.0

    def ahead(self, cold_s: float, settings: ScalingSettings) -> float:
        """Work per second once a replica that starts now is ready, if a rise goes on till then.

        A rise that chance may explain is not drawn out.
        """
        rise = self.fast - self.slow
        if rise <= 2.0 * self.noise or settings.slow_s <= settings.fast_s:
            return self.fast
        per_s = rise / ((settings.slow_s - settings.fast_s) / 2)
        return self.fast + per_s * (settings.fast_s / 2 + cold_s)


@dataclass(frozen=True)
class PoolMemory:
    """The memory of one pool.

    Args:
        counters: The counters of every replica when it was heard last, and when that was.
        samples: What arrived, oldest first.
        enough: Numbers of replicas that were enough, by time, oldest first.
    """

    counters: Mapping[str, tuple[float, tuple[float, float, float]]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    enough: tuple[tuple[float, int], ...] = ()

    def heard(
        self, now_s: float, reports: Mapping[str, Heard], read: Counter, keep_s: float
    ) -> PoolMemory:
        """The memory after these reports."""
        counters = dict(self.counters)
        requests = work_s = square_s = span_s = 0.0
        for name, report in reports.items():
            values = read(report)
            if values is None:
                continue
            before_s, before = counters.get(name, (None, (0.0, 0.0, 0.0)))
            if before_s is None or report.at_s > before_s:
                counters[name] = (report.at_s, values)
            if before_s is not None and report.at_s > before_s:
                passed_s = report.at_s - before_s
                gained = [max(0.0, a - b) for a, b in zip(values, before, strict=True)]
                requests += gained[0] / passed_s
                work_s += gained[1] / passed_s
                square_s += gained[2] / passed_s
                span_s = max(span_s, passed_s)
        samples = tuple(one for one in self.samples if one.at_s > now_s - keep_s)
        if span_s:
            samples = (*samples, Sample(now_s, span_s, requests, work_s, square_s))
        known = {name: value for name, value in counters.items() if name in reports}
        return PoolMemory(known, samples, self.enough)

    def with_enough(self, now_s: float, number: int, keep_s: float) -> PoolMemory:
        """The memory after ``number`` replicas were enough."""
        kept = tuple(one for one in self.enough if one[0] > now_s - keep_s)
        return PoolMemory(self.counters, self.samples, (*kept, (now_s, number)))

    def rates(self, now_s: float, fast_s: float) -> Rates:
        """The rates at which work arrives."""
        if not self.samples:
            return Rates()
        recent = [one for one in self.samples if one.at_s > now_s - fast_s] or self.samples[-1:]
        fast, slow = _mean(recent, "work_s"), _mean(self.samples, "work_s")
        requests, square = _mean(self.samples, "requests"), _mean(self.samples, "square_s")
        mean_s = slow / requests if requests else 0.0
        variation = max(0.0, square / requests / mean_s**2 - 1.0) if mean_s else 1.0
        span_s = sum(one.span_s for one in recent)
        return Rates(
            fast,
            slow,
            math.sqrt(square / span_s) if span_s else 0.0,
            mean_s,
            (self._dispersion() + variation) / 2,
        )

    def _dispersion(self) -> float:
        """Variance over mean of the numbers of arrivals; 1 if none knows of the others.

        Neighbouring samples are compared, so a load that slowly changes is not taken for bursts.
        """
        counts = [one.requests * one.span_s for one in self.samples]
        if len(counts) < 8 or not sum(counts):
            return 1.0
        steps = [(b - a) ** 2 / 2 for a, b in pairwise(counts)]
        dispersion = sum(steps) / len(steps) / (sum(counts) / len(counts))
        return min(max(dispersion, 1.0), _MOST_DISPERSED)


def _mean(samples: Sequence[Sample], name: str) -> float:
    """Mean of a rate, weighted by the time for which it holds."""
    total = sum(one.span_s for one in samples)
    return sum(getattr(one, name) * one.span_s for one in samples) / total if total else 0.0
