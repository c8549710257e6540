"""The rows of one decode step in one group of blocks: where their entries lie, and who writes.

Shapes: B = rows, N = blocks of the group, H = KV heads, D = head dimension, K = entries attended
to, R = rows of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayapp.engine.attention.spans import RowPlace, Span, spans_of
from rayapp.engine.attention.step import GroupStep, SharedPrompt, SpanKV
from rayapp.engine.pages import Arena, Sheet
from rayapp.engine.sequences.entries import Entries

CALL_BYTES = 160 << 10
"""Bytes of KV that are taken to be read in the time of one more call of attention: 40
microseconds at 4 GB/s (project default; ``benchmarks/paged_decode.py`` measures whole steps)."""


class StepRows:
    """The rows of a step, whose new entries have their places.

    Args:
        arena: The memory.
        rows: The entries of every row of the batch, the new one included.
        num_blocks: Number of blocks of the group.
    """

    def __init__(self, arena: Arena, rows: Sequence[Entries], num_blocks: int) -> None:
        self._arena = arena
        self._rows = rows
        places = [self._place(held) for held in rows]
        order = sorted(range(len(rows)), key=lambda row: (places[row].run, places[row].start))
        in_order = [rows[row] for row in order]
        heads, _, dim = arena.keys_HED.shape
        entry_bytes = 2 * heads * dim * arena.keys_HED.dtype.itemsize
        spans = spans_of([places[row] for row in order], CALL_BYTES // entry_bytes)
        moves = (
            None if order == list(range(len(rows))) else torch.tensor(order, device=arena.device)
        )
        self._targets = self._targets_of(places, num_blocks)
        self.step = GroupStep(
            arena,
            [self._view(in_order, span, num_blocks) for span in spans],
            self._shared(in_order),
            moves,
            None if moves is None else moves.argsort(),
        )

    def _place(self, held: Entries) -> RowPlace:
        size = self._arena.block_size
        sheet = held.sheet
        return RowPlace(sheet.first * size, sheet.pages * size, held.low, sheet.used)

    def _view(self, in_order: Sequence[Entries], span: Span, num_blocks: int) -> SpanKV:
        """The views of a span, for every block."""
        mask = self._bias(in_order, span)
        keys, values = (
            _views(memory_HED, span, num_blocks)
            for memory_HED in (self._arena.keys_HED, self._arena.values_HED)
        )
        return SpanKV(span.first, span.stop, keys, values, mask)

    def _bias(self, in_order: Sequence[Entries], span: Span) -> torch.Tensor | None:
        """The bias that a span adds to its products; entries that it hides are zeroed before."""
        rows, low, high = in_order[span.first : span.stop], span.low, span.high
        if all((held.low, held.sheet.used) == (low, high) for held in rows):
            return None
        for held in rows:
            self._arena.clean(held.sheet, high)
        entries_K = np.arange(low, high)
        used_B1 = np.array([[held.sheet.used] for held in rows])
        low_B1 = np.array([[held.low] for held in rows])
        hidden_BK = torch.from_numpy((entries_K >= used_B1) | (entries_K < low_B1))
        bias_BK = torch.zeros(hidden_BK.shape, dtype=self._arena.keys_HED.dtype)
        bias_BK.masked_fill_(hidden_BK, -torch.inf)
        return bias_BK.to(self._arena.device)[:, None, None]

    def _shared(self, in_order: Sequence[Entries]) -> list[SharedPrompt]:
        """The prompts that rows, in the order of the spans, share."""
        by_sheet: dict[Sheet, list[int]] = {}
        for row, held in enumerate(in_order):
            if held.prompt is not None:
                by_sheet.setdefault(held.prompt, []).append(row)
        return [
            SharedPrompt(torch.tensor(numbers, device=self._arena.device), sheet)
            for sheet, numbers in by_sheet.items()
        ]

    def _targets_of(self, places: Sequence[RowPlace], num_blocks: int) -> tuple[torch.Tensor, ...]:
        """Rows of the memory that take the new entries, ``(B * H,)`` for every block."""
        heads, num_entries, _ = self._arena.keys_HED.shape
        newest_B = np.array([place.start + place.high - 1 for place in places])
        run_B = np.array([place.run for place in places])
        entries_NB = newest_B + np.arange(num_blocks)[:, None] * run_B
        rows_NBH = entries_NB[:, :, None] + np.arange(heads) * num_entries
        targets_NR = torch.from_numpy(rows_NBH.reshape(num_blocks, -1))
        return targets_NR.to(self._arena.device).unbind()

    def write(self, keys_BH1D: torch.Tensor, values_BH1D: torch.Tensor, index: int) -> None:
        """Write the new entries of block ``index``."""
        rows_R = self._targets[index]
        self._arena.key_rows.index_copy_(0, rows_R, keys_BH1D.flatten(0, 2))
        self._arena.value_rows.index_copy_(0, rows_R, values_BH1D.flatten(0, 2))

    def gathered(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies ``(B, H, K, D)`` of all that rows see in block ``index``: keys, values.

        For blocks that run as modules; rows are padded with zeros, which :meth:`mask` hides.
        """
        heads, _, dim = self._arena.keys_HED.shape
        most = max(held.num_seen for held in self._rows)
        keys_BHKD = self._arena.keys_HED.new_zeros((len(self._rows), heads, most, dim))
        values_BHKD = torch.zeros_like(keys_BHKD)
        for row, held in enumerate(self._rows):
            stop = 0
            for sheet, low in (
                *([(held.prompt, 0)] if held.prompt else []),
                (held.sheet, held.low),
            ):
                keys_HNLD, values_HNLD = self._arena.runs(sheet, low, sheet.used)
                start, stop = stop, stop + sheet.used - low
                keys_BHKD[row, :, start:stop] = keys_HNLD[:, index]
                values_BHKD[row, :, start:stop] = values_HNLD[:, index]
        return keys_BHKD, values_BHKD

    def mask(self) -> torch.Tensor | None:
        """The bool mask ``(B, 1, 1, K)`` of :meth:`gathered`; None if no row is padded."""
        seen_B = np.array([held.num_seen for held in self._rows])
        if (seen_B == seen_B.max()).all():
            return None
        mask_BK = np.arange(seen_B.max()) < seen_B[:, None]
        return torch.from_numpy(mask_BK).to(self._arena.device)[:, None, None]


def _views(memory_HED: torch.Tensor, span: Span, num_blocks: int) -> tuple[torch.Tensor, ...]:
    """The entries of a span's rows, ``(B, H, K, D)`` for every block, without a copy."""
    heads, num_entries, dim = memory_HED.shape
    shape = (span.stop - span.first, heads, span.high - span.low, dim)
    if not span.run_step:  # All blocks lie alike.
        strides = (span.place.run * dim, span.row_step * dim, num_entries * dim, dim, 1)
        return memory_HED.as_strided((num_blocks, *shape), strides, span.offset(0) * dim).unbind()
    return tuple(
        memory_HED.as_strided(
            shape, (span.stride(run) * dim, num_entries * dim, dim, 1), span.offset(run) * dim
        )
        for run in range(num_blocks)
    )
