"""Where the KV of one decode step lies: all that an attention backend is told.

Shapes: B = rows of the step, H = KV heads, G = query heads per KV head, D = head dimension,
K = entries attended to, N = blocks of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rayapp.engine.attention.spans import Span
from rayapp.engine.pages import Arena, Sheet


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt's sheet that several rows read, each together with entries of its own.

    ``rows`` are the rows' numbers in the order of the spans, int64.
    """

    rows: torch.Tensor
    sheet: Sheet


@dataclass(frozen=True)
class GroupStep:
    """Where the rows of a step find the KV of the blocks of one group.

    Args:
        arena: The memory.
        spans: The rows, divided into views; with ``masks`` ``(rows, 1, 1, K)``, added to the
            products, None where no entry of a view is masked.
        shared: Prompts that rows share, which come before the entries in the spans.
        order: The row of the batch that each row of the spans is; None if the orders are equal.
        back: The inverse of ``order``.
        targets: For each block of the group, rows of the arena's memory that take the step's new
            entries, by row of the batch and head.
    """

    arena: Arena
    spans: Sequence[Span]
    masks: Sequence[torch.Tensor | None]
    shared: Sequence[SharedPrompt]
    order: torch.Tensor | None
    back: torch.Tensor | None
    targets: Sequence[torch.Tensor]


class AttentionBackend(Protocol):
    """A way to attend over pages."""

    def __call__(
        self, query_BHGD: torch.Tensor, step: GroupStep, index: int, scale: float
    ) -> torch.Tensor:
        """Attention outputs ``(B, H, G, D)`` of block ``index`` of the step's group."""
        ...
