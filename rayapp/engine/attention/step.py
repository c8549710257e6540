"""The interface of attention backends: the places of the KV that one decode step reads.

Shapes: B = rows of the step, H = KV heads, G = query heads per KV head, D = head dimension,
K = entries attended to, N = blocks of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rayapp.engine.pages import Arena, Sheet


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt's sheet that several rows read, together with entries of their own.

    ``rows`` are the rows' numbers in the order of the spans, int64.
    """

    rows: torch.Tensor
    sheet: Sheet


@dataclass(frozen=True)
class SpanKV:
    """The entries that the rows of one span read, as views of the pages.

    Args:
        first: The first row of the span.
        stop: The row after its last.
        keys: Keys ``(B, H, K, D)`` of every block of the group.
        values: Values, in the same way.
        mask: What is added to the products, ``(B, 1, 1, K)``; None if no entry is masked.
    """

    first: int
    stop: int
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    mask: torch.Tensor | None


@dataclass(frozen=True)
class GroupStep:
    """The places of the KV that the rows of a step read, in the blocks of one group.

    Args:
        arena: The memory.
        spans: The rows, divided into views.
        shared: Prompts that rows share, which come before the entries in the spans.
        order: Numbers in the batch of the rows of the spans; None if the orders are equal.
        back: The inverse of ``order``.
    """

    arena: Arena
    spans: Sequence[SpanKV]
    shared: Sequence[SharedPrompt]
    order: torch.Tensor | None
    back: torch.Tensor | None


class AttentionBackend(Protocol):
    """A way to attend over pages."""

    def __call__(
        self, query_BHGD: torch.Tensor, step: GroupStep, index: int, scale: float
    ) -> torch.Tensor:
        """Attention outputs ``(B, H, G, D)`` of block ``index`` of the step's group."""
        ...
