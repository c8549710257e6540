"""The memory of a policy between two decisions, and the rates that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.view import Heard

Counter = Callable[[Heard], tuple[float, float, float] | None]
"""Reads three counters of a report that only grow: requests, seconds, and their squares."""

_MOST_DISPERSED = 4.0
SIGNIFICANT = 2.0
"""Standard deviations beyond which a number of requests is no chance (project default)."""
RARE = 3.0
"""Standard deviations beyond which a rate of arrivals is no chance; work that waits is noticed
anyway (project default)."""
_MOST_PATIENT = 4.0
_REGRET = 3.0
# Serve decides ten times a second; memories are kept by the second.
_GRAIN_S = 1.0
_STARTS = 9


@dataclass(frozen=True)
class Sample:
    """Arrivals between two reports, per second: requests, work, and its squares."""

    at_s: float
    span_s: float
    requests: float
    work_s: float
    square_s: float


@dataclass(frozen=True)
class Rates:
    """The rates at which work arrives at a pool.

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

    @property
    def rises(self) -> bool:
        """True if more arrives than before, and more than chance explains."""
        return self.fast > self.slow + RARE * self.noise

    def ahead(self, cold_s: float, settings: ScalingSettings) -> float:
        """Work per second that is to be expected once a replica that starts now is ready.

        It is the mean over a longer time, unless the load rises or falls by more than chance
        explains. A rise is drawn out, if there is any time to look ahead.
        """
        if self.fast < self.slow - SIGNIFICANT * self.noise:
            return self.fast
        if not self.rises or settings.slow_s <= settings.fast_s:
            return self.slow
        if cold_s <= 0.0:
            return self.fast
        per_s = (self.fast - self.slow) / ((settings.slow_s - settings.fast_s) / 2)
        return self.fast + per_s * (settings.fast_s / 2 + cold_s)


@dataclass(frozen=True)
class Level:
    """A number that is measured again and again: requests that a pool holds, or how large they are.

    Args:
        now: The number at present.
        fast: Mean over the last seconds.
        slow: Mean over a longer time.
        per_s: Growth per second over the last seconds.
    """

    now: float
    fast: float
    slow: float
    per_s: float

    @property
    def rises(self) -> bool:
        """True if more are there than before, and more than chance explains.

        Independent arrivals leave numbers that vary by their square root.
        """
        return self.fast > self.slow + SIGNIFICANT * math.sqrt(max(1.0, self.slow))

    @property
    def falls(self) -> bool:
        """True if fewer are there than before, and fewer than chance explains."""
        return self.fast < self.slow - SIGNIFICANT * math.sqrt(max(1.0, self.slow))

    def ahead(self, cold_s: float) -> float:
        """Requests that are to be expected once a replica that starts now is ready."""
        if self.rises:
            return max(self.fast, self.now) + max(0.0, self.per_s) * cold_s
        return self.fast if self.falls else max(self.fast, self.slow)


@dataclass(frozen=True)
class PoolMemory:
    """The memory of one pool.

    Args:
        counters: The counters of every replica when it was heard last, and when that was.
        samples: What arrived, oldest first.
        levels: Requests that the pool had, by time, oldest first.
        enough: Numbers of replicas that were enough, by time, oldest first.
        shrunk_s: When the pool shrank last; None if it never did.
        patience: Factor of the time for which less must be enough before the pool shrinks.
        running: Number of replicas that ran when they were counted last.
        awaited: Moments at which replicas were decided for that do not run yet.
        starts_s: Seconds that the last replicas took from their decision until they ran.
    """

    counters: Mapping[str, tuple[float, tuple[float, float, float]]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    levels: tuple[tuple[float, float], ...] = ()
    enough: tuple[tuple[float, int], ...] = ()
    shrunk_s: float | None = None
    patience: float = 1.0
    running: int = 0
    awaited: tuple[float, ...] = ()
    starts_s: tuple[float, ...] = ()

    def seen(self, now_s: float, running: int, target: int) -> PoolMemory:
        """The memory after so many replicas were seen to run, where ``target`` were wanted."""
        arrived = self.awaited[: max(0, running - self.running)]
        starts_s = (*self.starts_s, *(now_s - moment for moment in arrived))[-_STARTS:]
        left = self.awaited[len(arrived) :][: max(0, target - running)]
        return replace(self, running=running, awaited=left, starts_s=starts_s)

    def cold_start_s(self, loaded_s: Sequence[float], usual_s: float) -> float:
        """Seconds until a new replica works.

        Those that were measured count; before any was, the usual time and the time that replicas
        say they took to load.
        """
        if self.starts_s:
            return float(median(self.starts_s))
        return max(usual_s, *loaded_s) if loaded_s else usual_s

    def heard(
        self,
        now_s: float,
        reports: Mapping[str, Heard],
        read: Counter,
        keep_s: float,
        factor: float = 1.0,
    ) -> PoolMemory:
        """The memory after these reports, which stand for ``factor`` times as many replicas."""
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
            arrived = (factor * value for value in (requests, work_s, square_s))
            samples = (*samples, Sample(now_s, span_s, *arrived))
        known = {name: value for name, value in counters.items() if name in reports}
        return replace(self, counters=known, samples=samples)

    def with_level(self, now_s: float, level: float, keep_s: float) -> PoolMemory:
        """The memory after the pool had ``level`` requests."""
        if self.levels and now_s - self.levels[-1][0] < _GRAIN_S:
            return replace(self, levels=(*self.levels[:-1], (self.levels[-1][0], level)))
        kept = tuple(one for one in self.levels if one[0] > now_s - keep_s)
        return replace(self, levels=(*kept, (now_s, level)))

    def with_enough(self, now_s: float, number: int, delay_s: float) -> PoolMemory:
        """The memory after ``number`` replicas were enough."""
        if self.enough and now_s - self.enough[-1][0] < _GRAIN_S:
            last_s, most = self.enough[-1]
            return replace(self, enough=(*self.enough[:-1], (last_s, max(most, number))))
        keep_s = delay_s * _MOST_PATIENT
        kept = tuple(one for one in self.enough if one[0] > now_s - keep_s)
        return replace(self, enough=(*kept, (now_s, number)))

    def changed(self, now_s: float, by: int, delay_s: float) -> PoolMemory:
        """The memory after the pool grew or shrank by a number of replicas.

        A pool that must grow again soon after it shrank shrank too early, and waits twice as long
        before the next time; one that did not waits half as long again.
        """
        if by < 0:
            calm = self.shrunk_s is not None and now_s - self.shrunk_s > self._regret_s(delay_s)
            patience = max(1.0, self.patience / 2) if calm else self.patience
            return replace(self, shrunk_s=now_s, patience=patience)
        grown = replace(self, awaited=(*self.awaited, *[now_s] * by))
        if self.shrunk_s is None or now_s - self.shrunk_s > self._regret_s(delay_s):
            return grown
        return replace(grown, shrunk_s=None, patience=min(2 * self.patience, _MOST_PATIENT))

    def _regret_s(self, delay_s: float) -> float:
        return _REGRET * delay_s * self.patience

    def most_enough(self, now_s: float, delay_s: float) -> int | None:
        """The most replicas that were needed in the time that counts; None before it has passed."""
        span_s = delay_s * self.patience
        if not self.enough or now_s - self.enough[0][0] < 0.95 * span_s:
            return None
        return max(number for at_s, number in self.enough if at_s > now_s - span_s - 1e-9)

    def level(self, now_s: float, fast_s: float) -> Level:
        """The requests that the pool holds."""
        if not self.levels:
            return Level(0.0, 0.0, 0.0, 0.0)
        recent = [one for one in self.levels if one[0] > now_s - fast_s] or self.levels[-1:]
        (from_s, first), (to_s, last) = recent[0], recent[-1]
        return Level(
            now=last,
            fast=sum(number for _, number in recent) / len(recent),
            slow=sum(number for _, number in self.levels) / len(self.levels),
            per_s=(last - first) / (to_s - from_s) if to_s > from_s else 0.0,
        )

    def rates(self, now_s: float, fast_s: float) -> Rates:
        """The rates at which work arrives."""
        if not self.samples:
            return Rates()
        recent = [one for one in self.samples if one.at_s > now_s - fast_s] or self.samples[-1:]
        fast, slow = _mean(recent, "work_s"), _mean(self.samples, "work_s")
        requests, square = _mean(self.samples, "requests"), _mean(self.samples, "square_s")
        mean_s = slow / requests if requests else 0.0
        variation = max(0.0, square / requests / mean_s**2 - 1.0) if mean_s else 1.0
        span_s, dispersion = sum(one.span_s for one in recent), self._dispersion()
        return Rates(
            fast,
            slow,
            math.sqrt(square / span_s * dispersion) if span_s else 0.0,
            mean_s,
            (dispersion + variation) / 2,
        )

    def request_rates(self, now_s: float, fast_s: float) -> Rates:
        """The rates at which requests arrive, whatever their work."""
        if not self.samples:
            return Rates()
        recent = [one for one in self.samples if one.at_s > now_s - fast_s] or self.samples[-1:]
        fast, slow = _mean(recent, "requests"), _mean(self.samples, "requests")
        span_s, dispersion = sum(one.span_s for one in recent), self._dispersion()
        noise = math.sqrt(slow / span_s * dispersion) if span_s else 0.0
        return Rates(fast, slow, noise, 1.0, dispersion / 2)

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
