"""Reports of the replicas: the numbers that admission, routing and scaling work with.

A report travels as a flat mapping of names to numbers, which is all that Serve carries. Counters
only ever grow, so a report that is lost costs nothing: the next one tells the same sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from rayapp.scaling.costs import DecodeCost


class _Flat:
    """A report that is read from and written to numbers by name."""

    def numbers(self) -> dict[str, float]:
        """The report as Serve carries it."""
        return {name: float(value) for name, value in asdict(self).items()}  # type: ignore[call-overload]

    @classmethod
    def read(cls, numbers: Mapping[str, Any]) -> Self | None:
        """The report that these numbers make; None if one is missing or is no number."""
        found = {}
        for field in fields(cls):  # type: ignore[arg-type]
            value = numbers.get(field.name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                return None
            found[field.name] = float(value)
        return cls(**found)


@dataclass(frozen=True)
class PrefillReport(_Flat):
    """The report of one prefill replica.

    Args:
        queued_s: Seconds of prefill that it has before it, queued and running.
        arrived: Number of prompts that came so far.
        arrived_s: Seconds of prefill that came so far.
        arrived_square_s: Sum of the squares of the seconds of every prompt so far.
        token_s: Seconds per prompt token, at the lengths that come.
        start_s: Seconds from the begin of its process until it could work.
    """

    queued_s: float
    arrived: float
    arrived_s: float
    arrived_square_s: float
    token_s: float
    start_s: float


@dataclass(frozen=True)
class DecodeReport(_Flat):
    """The report of one decode replica.

    Args:
        rows: Number of sequences that run.
        waiting: Number of sequences that wait for a slot or for pages.
        entries: Entries of KV of the sequences that run.
        max_rows: Number of slots.
        max_entries: Entries that its pages hold.
        step_s: Seconds of a step, without its sequences.
        row_s: Seconds of a step per sequence.
        entry_s: Seconds of a step per entry of KV.
        answer_tokens: Mean number of tokens of an answer.
        arrived: Number of sequences that came so far.
        start_s: Seconds from the begin of its process until it could work.
    """

    rows: float
    waiting: float
    entries: float
    max_rows: float
    max_entries: float
    step_s: float
    row_s: float
    entry_s: float
    answer_tokens: float
    arrived: float
    start_s: float

    @property
    def cost(self) -> DecodeCost:
        """The measured cost of its steps."""
        return DecodeCost(step_s=self.step_s, row_s=self.row_s, entry_s=self.entry_s)


@dataclass(frozen=True)
class IngressReport(_Flat):
    """The report of one ingress replica.

    Args:
        waiting_tokens: Prompt tokens of requests that have not reached a prefill replica.
        sent: Number of transfers so far.
        sent_s: Seconds that the links were busy with KV so far.
    """

    waiting_tokens: float
    sent: float
    sent_s: float


@dataclass(frozen=True)
class Standing(_Flat):
    """The standing of a replica, for the router.

    Args:
        at_s: The moment, Unix time in seconds.
        work_s: Seconds of work that it has before it.
        token_s: Seconds of work per prompt token that is sent to it.
        errand_s: Seconds of work of every request that is sent to it, whatever its length.
        num_failed: Steps that failed one after the other.
        lasts_s: Seconds that an answer lasts, if many are made side by side; 0 if one by one.
        wait_s: Seconds until it would have room for one more request.
        step_s: Seconds of a step of the sequences that it runs; 0 where none run.
        prompts_s: Seconds of prompts that it is to prefill beside its sequences.
        most_prompt: Most tokens of a prompt that it prefills beside them; 0 where it never does.
    """

    at_s: float
    work_s: float
    token_s: float
    errand_s: float
    num_failed: float
    lasts_s: float = 0.0
    wait_s: float = 0.0
    step_s: float = 0.0
    prompts_s: float = 0.0
    most_prompt: float = 0.0


Report = PrefillReport | DecodeReport | IngressReport
