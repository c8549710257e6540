"""What the KV of prompts weighs under a plan, as the ledger will count it, without sending it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rayapp.evaluation.likelihood import TwoStages
from rayapp.kv.forecast import forecast_sizes
from rayapp.kv.ledger import KVShape
from rayapp.kv.wire import Envelope

_REQUEST_ID = "0" * 32  # as long as the service's: lengths count by the header's padding only


@dataclass(frozen=True)
class PromptBytes:
    """Sums over prompts: of their dense caches, and of everything that is sent instead."""

    bytes_full: int
    bytes_sent: int
    overhead_bytes: int

    @classmethod
    def of(cls, side: TwoStages, prompt_lengths: Iterable[int]) -> PromptBytes:
        """The KV messages of prompts of these lengths, in the model's element type."""
        shape, plan = KVShape.of(side.decode), side.plan
        weights = plan.model.weights_fingerprint if plan.model else ""
        envelope = Envelope(_REQUEST_ID, 0, plan.fingerprint, weights)
        return cls.total(
            cls(
                count * shape.dense_bytes(length),
                count * sizes.total_bytes,
                count * sizes.overhead_bytes,
            )
            for length, count in sorted(Counter(prompt_lengths).items())
            for sizes in [forecast_sizes(shape, side.decode.dtype, plan, envelope, length)]
        )

    @classmethod
    def total(cls, parts: Iterable[PromptBytes]) -> PromptBytes:
        """The sum."""
        each = [(part.bytes_full, part.bytes_sent, part.overhead_bytes) for part in parts]
        return cls(*(sum(column) for column in zip(*each, strict=True)))

    def fields(self) -> dict[str, int]:
        """By name, for a result."""
        return asdict(self)
