"""Spans: rows of a batch that one call of attention reads as one strided view.

Rows whose runs lie evenly in memory can be read together, as far as the longest of them; what the
others lack is masked, and read in vain. Rows are put together where reading in vain costs less than
another call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowPlace:
    """The place of one row's entries, in all runs of its sheet; all numbers count entries.

    Entry ``e`` of run ``i`` is at ``start + i * run + e``. The row attends to entries ``low`` to
    ``high`` (exclusive); ``high <= run``.
    """

    start: int
    run: int
    low: int
    high: int


@dataclass(frozen=True)
class Span:
    """Rows ``first`` to ``stop`` (exclusive), read from ``low`` to ``high`` in one view.

    Row ``first + r`` starts at ``place.start + r * row_step`` and its runs have ``place.run +
    r * run_step`` entries.
    """

    first: int
    stop: int
    place: RowPlace
    row_step: int
    run_step: int
    low: int
    high: int

    def stride(self, run: int) -> int:
        """Number of entries from a row's run ``run`` to the same run of the next row."""
        return self.row_step + run * self.run_step

    def offset(self, run: int) -> int:
        """Index of the first entry that is read of run ``run``."""
        return self.place.start + run * self.place.run + self.low


def spans_of(rows: Sequence[RowPlace], call_entries: int) -> list[Span]:
    """Divide rows into spans of neighbours, from the first row on, as long as it pays.

    Args:
        rows: The places of all rows, in an order in which rows of like sheets are neighbours.
        call_entries: Entries that are read in the time that one more call takes.
    """
    spans: list[Span] = []
    for number, row in enumerate(rows):
        wider = _with_row(spans[-1], rows[number - 1], row, call_entries) if spans else None
        if wider is not None:
            spans[-1] = wider
        else:
            spans.append(Span(number, number + 1, row, 0, 0, row.low, row.high))
    return spans


def _with_row(span: Span, last: RowPlace, row: RowPlace, call_entries: int) -> Span | None:
    """The span with one more row after ``last``; None if it cannot or should not be read so."""
    row_step, run_step = row.start - last.start, row.run - last.run
    count = span.stop - span.first
    if row_step <= 0 or (count > 1 and (row_step, run_step) != (span.row_step, span.run_step)):
        return None
    low, high = min(span.low, row.low), max(span.high, row.high)
    # Runs grow or shrink evenly from row to row, so the first or the last row has the shortest.
    if high > min(span.place.run, row.run):
        return None
    apart = count * (span.high - span.low) + row.high - row.low + call_entries
    if (count + 1) * (high - low) > apart:
        return None
    return Span(span.first, span.stop + 1, span.place, row_step, run_step, low, high)
