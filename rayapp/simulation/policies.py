"""Policies that a simulation can follow: the service's own, and pools of fixed size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rayapp.scaling.policy import Memory, decide
from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.view import Decision, PoolView


@dataclass(frozen=True)
class Facts:
    """Metrics of one pool that other policies look at.

    Args:
        num_present: Requests that run or wait there, as the callers count them.
        queued_tokens: Prompt tokens that wait for prefill.
        usage: Sum over replicas of the share of slots or pages in use.
        arrived: Requests that came so far.
        computed_tokens: Tokens that were computed so far.
    """

    num_present: int = 0
    queued_tokens: int = 0
    usage: float = 0.0
    arrived: int = 0
    computed_tokens: int = 0


class Policy(Protocol):
    """Decides the sizes of pools, again and again."""

    def sizes(
        self, view: Mapping[str, PoolView], facts: Mapping[str, Facts], now_s: float
    ) -> dict[str, Decision]:
        """The sizes from now on; a pool that is left out keeps its size.

        Args:
            view: The pools with the reports of their replicas.
            facts: Metrics by pool.
            now_s: The present time, seconds.
        """
        ...


class OwnPolicy:
    """The service's policy, with the memory that the service would keep."""

    def __init__(self, settings: ScalingSettings) -> None:
        self._settings = settings
        self._memory = Memory()

    def sizes(
        self, view: Mapping[str, PoolView], facts: Mapping[str, Facts], now_s: float
    ) -> dict[str, Decision]:
        """Decide as the service does."""
        del facts
        decisions, self._memory = decide(self._settings, self._memory, view, now_s)
        return decisions


class FixedPolicy:
    """Pools that keep the size with which they begin."""

    def sizes(
        self, view: Mapping[str, PoolView], facts: Mapping[str, Facts], now_s: float
    ) -> dict[str, Decision]:
        """Leave every pool at its size."""
        del view, facts, now_s
        return {}
