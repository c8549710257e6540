"""Bytes of prompts' KV under a plan, as the ledger will count them, without sending it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from typing import Any

from rayapp.evaluation.measures.likelihood import TwoStages
from rayapp.kv.forecast import RunPrompt, forecast_envelope, forecast_sizes
from rayapp.kv.ledger import KVShape


@dataclass(frozen=True)
class PromptBytes:
    """Sums over prompts: their dense caches, the messages sent instead, and savings."""

    bytes_full: int
    bytes_sent: int
    overhead_bytes: int
    saved_by_visual_tokens_bytes: int = 0

    @classmethod
    def of(cls, side: TwoStages, prompt_lengths: Iterable[int]) -> PromptBytes:
        """The KV messages of text prompts of these lengths, in the model's element type."""
        shape, plan = KVShape.of(side.decode), side.plan
        envelope = forecast_envelope(plan)
        return cls.total(
            cls(
                count * shape.dense_bytes(length),
                count * sizes.total_bytes,
                count * sizes.overhead_bytes,
            )
            for length, count in sorted(Counter(prompt_lengths).items())
            for sizes in [
                forecast_sizes(shape, side.decode.dtype, plan, envelope, RunPrompt(length))
            ]
        )

    @classmethod
    def total(cls, parts: Iterable[PromptBytes]) -> PromptBytes:
        """The sum of two counts."""
        return cls(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))

    def fields(self) -> dict[str, Any]:
        """The counts by name, for a result."""
        return asdict(self)
