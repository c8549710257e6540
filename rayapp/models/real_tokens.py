"""Batches whose tokens run end to end, without their padding.

Everything in a block but attention treats tokens one by one, so tokens of rows and batches of any
length may stand in one row. Only attention needs them in their batches: it takes its queries apart
and joins what it attended (:mod:`rayapp.models.attention`), and a cache does so with new keys and
values. Of lines with answers of 5 to 100 tokens, padding was more than half of what was computed.
Shapes: B = rows of a batch, T = tokens of its rows (padded), N = real tokens of all batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RealTokens:
    """The real tokens of some batches, in the order of batches, rows and tokens.

    Args:
        valid: Which tokens of the batches are real, bool ``(B, T)``, one mask per batch.

    Attributes:
        counts: Number of real tokens of every batch.
    """

    def __init__(self, valid: Sequence[torch.Tensor]) -> None:
        self._shapes = [tuple(mask_BT.shape) for mask_BT in valid]
        self._places = [
            None if bool(mask_BT.all()) else mask_BT.flatten().nonzero()[:, 0].cpu()
            for mask_BT in valid
        ]
        self.counts = [int(mask_BT.sum()) for mask_BT in valid]

    @classmethod
    def full(cls, *shapes: tuple[int, int]) -> RealTokens:
        """Batches of these shapes without any padding."""
        return cls([torch.ones(shape, dtype=torch.bool) for shape in shapes])

    def joined(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """The real tokens of ``(B, T, ...)`` batches in one row, ``(1, N, ...)``."""
        parts = []
        for batch, places in zip(batches, self._places, strict=True):
            flat = batch.reshape(batch.shape[0] * batch.shape[1], *batch.shape[2:])
            parts.append(flat if places is None else flat.index_select(0, places.to(flat.device)))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def apart(self, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A row ``(1, N, ...)`` as batches ``(B, T, ...)``, with zeros for padding."""
        batches, trailing = [], row.shape[2:]
        for part, shape, places in zip(
            row[0].split(self.counts), self._shapes, self._places, strict=True
        ):
            if places is not None:
                padded = part.new_zeros((shape[0] * shape[1], *trailing))
                part = padded.index_copy_(0, places.to(part.device), part)
            batches.append(part.reshape(*shape, *trailing))
        return tuple(batches)

    def heads_apart(self, row_1HND: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys or values of all tokens as batches ``(B, H, T, D)``."""
        return tuple(batch.transpose(1, 2) for batch in self.apart(row_1HND.transpose(1, 2)))
