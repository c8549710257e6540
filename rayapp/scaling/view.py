"""The pools of a service as a policy sees them, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rayapp.scaling.reports import DecodeReport, IngressReport, PrefillReport

PREFILL, DECODE, UNIFIED, INGRESS = "prefill", "decode", "unified", "ingress"


@dataclass(frozen=True)
class Heard:
    """The last reports of one replica, and when they were made; a kind that it has not is None."""

    at_s: float
    prefill: PrefillReport | None = None
    decode: DecodeReport | None = None
    ingress: IngressReport | None = None


@dataclass(frozen=True)
class PoolView:
    """One pool: its bounds, the number of replicas it is to have, and those that run.

    Args:
        minimum: Fewest replicas.
        maximum: Most replicas; equal to the minimum in a pool of fixed size.
        target: Number of replicas that were decided last; some may still start.
        running: Names of the replicas that run, whether they report or not.
        heard: The last reports, by replica; a replica that never reported is missing.
    """

    minimum: int
    maximum: int
    target: int
    running: tuple[str, ...]
    heard: Mapping[str, Heard] = field(default_factory=dict)

    def fresh(self, now_s: float, stale_s: float) -> dict[str, Heard]:
        """The reports of replicas that run and were heard within ``stale_s``."""
        return {
            name: self.heard[name]
            for name in self.running
            if name in self.heard and now_s - self.heard[name].at_s <= stale_s
        }


def silent_factor(pool: PoolView, fresh: Mapping[str, Heard]) -> float:
    """The replicas that carry work over those that are heard.

    A replica that reported once and does so no more carries as much as the others; one that never
    did is new and carries nothing yet.
    """
    silent = [name for name in pool.running if name in pool.heard and name not in fresh]
    return 1.0 + len(silent) / len(fresh) if fresh else 1.0


@dataclass(frozen=True)
class Decision:
    """The size of one pool from now on, and why.

    Args:
        pool: Name of the pool.
        before: Number of replicas it was to have.
        after: Number of replicas it is to have.
        reason: The reason in words, without the numbers of replicas.
    """

    pool: str
    before: int
    after: int
    reason: str

    @property
    def is_change(self) -> bool:
        """True if the pool grows or shrinks."""
        return self.before != self.after

    def __str__(self) -> str:
        if self.is_change:
            return f"{self.pool} {self.before} -> {self.after}: {self.reason}"
        return f"{self.pool} stays at {self.before}: {self.reason}"
