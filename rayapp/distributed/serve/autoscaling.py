"""Autoscaling policies: the number of replicas that a pool should have, from our own metrics.

Serve keeps the number within the pool's bounds and delays changes. The prefill pool follows the
prompt tokens in its queues. The decode pool follows the share of slots and entries in use, and the
requests that wait for a slot. Both sums are over the pool, so consolidation is counted before a
pool shrinks. If a number is missing, the pool keeps its size. Nothing here may raise: Serve would
silently fall back. Policies are classes because Serve passes ``policy_kwargs`` only to classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

Decision = tuple[int, dict[str, Any]]


class PrefillPolicy:
    """Policy that allows a replica at most ``tokens_per_replica`` prompt tokens in its queue."""

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> Decision:
        """Answer Serve's question for the pool's number of replicas."""
        return _decided(context, lambda: by_queued_tokens(context, self._tokens_per_replica))


class DecodePolicy:
    """Policy that uses a replica by at most ``target_usage``, waiting requests counted."""

    def __init__(self, target_usage: float) -> None:
        self._target_usage = target_usage

    def __call__(self, context: Any) -> Decision:
        """Answer Serve's question for the pool's number of replicas."""
        return _decided(context, lambda: by_usage(context, self._target_usage))


class UnifiedPolicy:
    """Policy that takes the larger of prefill's and decode's numbers."""

    def __init__(self, tokens_per_replica: int, target_usage: float) -> None:
        self._tokens_per_replica = tokens_per_replica
        self._target_usage = target_usage

    def __call__(self, context: Any) -> Decision:
        """Answer Serve's question for the pool's number of replicas."""
        return _decided(context, lambda: self._larger(context))

    def _larger(self, context: Any) -> int | None:
        queued = by_queued_tokens(context, self._tokens_per_replica)
        used = by_usage(context, self._target_usage)
        return None if queued is None or used is None else max(queued, used)


def by_queued_tokens(context: Any, tokens_per_replica: int) -> int | None:
    """Number of replicas for the tokens that wait; None if data is missing."""
    queued = _total(context, "queued_tokens")
    return None if queued is None else math.ceil(queued / tokens_per_replica)


def by_usage(context: Any, target_usage: float) -> int | None:
    """Number of replicas for the slots in use and wanted; None if data is missing."""
    usage, waiting = _total(context, "usage"), _total(context, "waiting")
    if usage is None or waiting is None:
        return None
    return math.ceil(round((usage + waiting) / target_usage, 6))


def _total(context: Any, name: str) -> float | None:
    """Sum of a metric over the running replicas, None unless all have reported it."""
    reported = (context.aggregated_metrics or {}).get(name) or {}
    values = [reported.get(replica) for replica in context.running_replicas]
    if not values or any(value is None or not math.isfinite(value) for value in values):
        return None
    return float(sum(value for value in values if value is not None))


def _decided(context: Any, decide: Callable[[], int | None]) -> Decision:
    """The decided number of replicas, at least one; without a decision, the present number."""
    try:
        wanted = decide()
    except Exception:
        logger.exception("an autoscaling policy failed; the pool stays as it is")
        wanted = None
    if wanted is None:
        return context.target_num_replicas, {}
    return max(1, wanted), {}
