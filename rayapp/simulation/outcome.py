"""The outcome of a simulation: the share of requests within targets, and the replicas it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from rayapp.scaling.settings import Targets
from rayapp.simulation.pool import Change
from rayapp.simulation.requests import Request


@dataclass(frozen=True)
class Moment:
    """The service at one moment: working replicas, prompts before their first token, sequences.

    Nodes are counted by stage where they come and go; a simulation has none.
    """

    at_s: float
    num_prefill: int
    num_decode: int
    num_prompts: int
    num_sequences: int
    num_prefill_nodes: int = 0
    num_decode_nodes: int = 0


@dataclass(frozen=True)
class Outcome:
    """The end of a simulation.

    Args:
        requests: All requests, refused ones included.
        targets: The targets that they are judged by.
        span_s: Seconds from the first arrival to the last token.
        replica_s: Seconds for which replicas had machines, by pool.
        changes: Changes of size, by pool.
        moments: The service every few seconds.
    """

    requests: Sequence[Request]
    targets: Targets
    span_s: float
    replica_s: Mapping[str, float]
    changes: Mapping[str, Sequence[Change]]
    moments: Sequence[Moment] = field(default_factory=tuple)

    @property
    def total_replica_s(self) -> float:
        """Replica-seconds of all pools."""
        return sum(self.replica_s.values())

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of all answers that ended."""
        return sum(one.arrival.num_answer for one in self.requests if one.finished_s is not None)

    def share_within(self, *, ttft: bool = True, tpot: bool = True) -> float:
        """Share of all requests within the targets that are looked at."""
        good = 0
        for one in self.requests:
            first_s, token_s = one.ttft_s, one.tpot_s
            is_answered = first_s is not None and token_s is not None
            is_early = not ttft or (first_s or 0.0) <= self.targets.ttft_s
            is_steady = not tpot or (token_s or 0.0) <= self.targets.tpot_s
            good += is_answered and is_early and is_steady
        return good / len(self.requests)

    def quantiles(self, name: str, shares: Sequence[float] = (50.0, 99.0)) -> list[float]:
        """Quantiles of ``ttft_s`` or ``tpot_s`` over answered requests; NaN without any."""
        known = [value for one in self.requests if (value := getattr(one, name)) is not None]
        if not known:
            return [float("nan")] * len(shares)
        return [float(value) for value in np.percentile(known, shares)]

    @property
    def num_changes(self) -> int:
        """Number of changes of size, of all pools."""
        return sum(map(len, self.changes.values()))

    def num_turns(self, pool: str) -> int:
        """Number of times that a pool grew after it had shrunk, or shrank after it had grown."""
        steps = [change.after - change.before for change in self.changes[pool]]
        return sum((one > 0) != (other > 0) for one, other in pairwise(steps))

    def numbers(self) -> dict[str, Any]:
        """Everything that is reported, as plain data."""
        ttft_p50, ttft_p99 = self.quantiles("ttft_s")
        tpot_p50, tpot_p99 = self.quantiles("tpot_s")
        hours = max(self.span_s, 1e-9) / 3600
        return {
            "requests": len(self.requests),
            "refused": sum(one.is_refused for one in self.requests),
            "within": self.share_within(),
            "within_ttft": self.share_within(tpot=False),
            "within_tpot": self.share_within(ttft=False),
            "ttft_p50_s": ttft_p50,
            "ttft_p99_s": ttft_p99,
            "tpot_p50_s": tpot_p50,
            "tpot_p99_s": tpot_p99,
            "replica_s": self.total_replica_s,
            **{f"{pool}_replica_s": seconds for pool, seconds in self.replica_s.items()},
            "changes_per_h": self.num_changes / hours,
            "turns": max((self.num_turns(pool) for pool in self.changes), default=0),
            "answer_tokens": self.num_answer_tokens,
            "span_s": self.span_s,
        }
