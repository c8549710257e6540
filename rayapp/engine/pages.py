"""Pages: one pool of equal pieces of KV memory per device, handed out as sheets.

A *page* holds the keys and values of ``block_size`` consecutive entries of one block. Blocks whose
KV has the same positions get their pages together, as a *sheet*: a run of equally many pages for
every block, one run after the other. On a CPU a run is read where it lies, because gathering
scattered pages would treble the traffic of KV; therefore pages of a run are neighbours, and a sheet
that cannot grow where it lies moves.

Sheets are counted references: answers to one prompt share its sheet. A sheet is *pinned* while
another thread copies into it, and is not moved then. A prefix cache would keep a sheet under a hash
of its tokens, with a reference of its own; there is none yet.
Shapes: H = KV heads, E = entries of all pages, D = head dimension.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from rayapp.errors import IntegrityError

Move = Callable[["Sheet", int, int], None]


@dataclass(eq=False)
class Sheet:
    """The pages of some blocks: ``num_runs`` runs of ``pages`` pages, from page ``first`` on.

    The first ``used`` entries of every run are filled. Those from there to ``clean`` are zero; what
    lies after them is unknown.
    """

    first: int
    num_runs: int
    pages: int
    used: int = 0
    clean: int = 0
    references: int = 1
    is_pinned: bool = False

    @property
    def size(self) -> int:
        """Number of pages of all runs."""
        return self.num_runs * self.pages

    @property
    def stop(self) -> int:
        """The first page after the sheet."""
        return self.first + self.size


class PagePool:
    """Which pages are taken, as sheets that do not overlap; no memory belongs to it.

    Args:
        num_pages: Number of pages.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._sheets: list[Sheet] = []  # By first page.

    @property
    def sheets(self) -> Sequence[Sheet]:
        """The sheets, by first page."""
        return self._sheets

    @property
    def num_taken(self) -> int:
        """Number of pages that sheets hold, filled or not."""
        return sum(sheet.size for sheet in self._sheets)

    @property
    def num_free(self) -> int:
        """Number of pages that no sheet holds, wherever they lie."""
        return self.num_pages - self.num_taken

    def num_filled(self, block_size: int) -> int:
        """Number of pages that hold an entry, where a page has ``block_size`` of them."""
        return sum(sheet.num_runs * -(-sheet.used // block_size) for sheet in self._sheets)

    def take(self, num_runs: int, pages: int) -> Sheet | None:
        """Take the first hole that is large enough; None if no hole is."""
        need, begin = num_runs * pages, 0
        for sheet in self._sheets:
            if sheet.first - begin >= need:
                break
            begin = sheet.stop
        if begin + need > self.num_pages or not need:
            return None
        taken = Sheet(begin, num_runs, pages)
        insort(self._sheets, taken, key=_first)
        return taken

    def share(self, sheet: Sheet) -> Sheet:
        """Add a reference."""
        sheet.references += 1
        return sheet

    def drop(self, sheet: Sheet) -> None:
        """Remove a reference; the pages are free once there is none."""
        sheet.references -= 1
        if not sheet.references:
            self._sheets.remove(sheet)

    def room_behind(self, sheet: Sheet) -> int:
        """Number of free pages right after a sheet."""
        place = self._sheets.index(sheet) + 1
        end = self._sheets[place].first if place < len(self._sheets) else self.num_pages
        return end - sheet.stop

    def compact(self, lean: Callable[[Sheet], int], move: Move) -> None:
        """Trim all sheets and move them down, so that free pages are one hole behind them.

        Args:
            lean: The pages per run that a sheet is to keep at least.
            move: Called with a sheet that is not pinned, its new first page and its new number of
                pages per run; it copies the sheet and sets its fields.
        """
        begin = 0
        for sheet in self._sheets:
            if not sheet.is_pinned:
                pages = min(sheet.pages, lean(sheet))
                if (sheet.first, sheet.pages) != (begin, pages):
                    move(sheet, begin, pages)
            begin = sheet.stop

    def open_behind(self, sheet: Sheet, need: int, move: Move) -> bool:
        """Move sheets up until ``need`` pages behind ``sheet`` are free; return whether they are.

        Only the pages after the last sheet are used up, so :meth:`compact` comes first.
        """
        above = self._sheets[self._sheets.index(sheet) + 1 :]
        shift = need - self.room_behind(sheet)
        end = above[-1].stop if above else sheet.stop
        if end + max(shift, 0) > self.num_pages or any(other.is_pinned for other in above):
            return False
        for other in reversed(above if shift > 0 else []):
            move(other, other.first + shift, other.pages)
        return self.room_behind(sheet) >= need

    def check(self, listed: Iterable[Sheet]) -> None:
        """Raise :class:`IntegrityError` if sheets overlap, or page tables list others.

        Args:
            listed: The sheets of all page tables, shared ones as often as they are shared.
        """
        begin = 0
        for sheet in self._sheets:
            if sheet.first < begin or sheet.stop > self.num_pages or sheet.size < 1:
                raise IntegrityError(
                    f"pages {sheet.first} to {sheet.stop} of {self.num_pages} are taken, but the "
                    f"pages before {begin} are another's"
                )
            begin = sheet.stop
        counts = Counter(map(id, listed))
        tables = {id(sheet): sheet.references for sheet in self._sheets}
        if counts != tables:
            raise IntegrityError(
                f"the page pool has {len(tables)} sheets with {sum(tables.values())} references, "
                f"page tables hold {len(counts)} with {sum(counts.values())}"
            )


class Arena:
    """The memory of one device's pages, and the pool that says which are taken.

    Memory is not filled at start, so on a CPU pages that were never used cost nothing.

    Args:
        num_pages: Number of pages.
        block_size: Entries of a page.
        shape_HD: Numbers of KV heads and of values per head.
        dtype: Element type of keys and values.
        device: Device of keys and values.
    """

    def __init__(
        self,
        num_pages: int,
        block_size: int,
        shape_HD: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads, dim = shape_HD
        self.pool = PagePool(num_pages)
        self.block_size = block_size
        self.device = device
        self.num_entries = num_pages * block_size
        self.keys_HED = torch.empty((heads, self.num_entries, dim), dtype=dtype, device=device)
        self.values_HED = torch.empty_like(self.keys_HED)
        # The memory seen as rows of D: a step writes one row per sequence and head.
        self.key_rows = self.keys_HED.flatten(0, 1)
        self.value_rows = self.values_HED.flatten(0, 1)

    @property
    def nbytes(self) -> int:
        """Number of bytes of keys and values, in use or not."""
        return self.keys_HED.nbytes + self.values_HED.nbytes

    def start(self, sheet: Sheet, run: int) -> int:
        """Index of the first entry of a run."""
        return (sheet.first + run * sheet.pages) * self.block_size

    def runs(self, sheet: Sheet, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``(H, runs, stop - start, D)`` of entries of every run: keys, values."""
        heads, _, dim = self.keys_HED.shape
        shape = (heads, sheet.num_runs, stop - start, dim)
        strides = (self.num_entries * dim, sheet.pages * self.block_size * dim, dim, 1)
        offset = (sheet.first * self.block_size + start) * dim
        return (
            self.keys_HED.as_strided(shape, strides, offset),
            self.values_HED.as_strided(shape, strides, offset),
        )

    def clean(self, sheet: Sheet, stop: int) -> None:
        """Zero a sheet's free entries up to ``stop``, and to the end of their page.

        A masked entry counts with weight 0, but 0 x inf is NaN, so numbers that another request
        left must go before a view reaches them.
        """
        if stop > sheet.clean:
            stop = min(-(-stop // self.block_size), sheet.pages) * self.block_size
            for view in self.runs(sheet, max(sheet.clean, sheet.used), stop):
                view.zero_()
            sheet.clean = stop

    def move(self, sheet: Sheet, first: int, pages: int) -> None:
        """Move a sheet's used entries to runs of ``pages`` pages from page ``first`` on.

        Old and new place may overlap if runs grow where they lie, or shrink while they move down.
        """
        source = [self.start(sheet, run) for run in range(sheet.num_runs)]
        sheet.first, sheet.pages, sheet.clean = first, pages, sheet.used
        target = [self.start(sheet, run) for run in range(sheet.num_runs)]
        # A run that moves up must leave before the run below it arrives, one that moves down after.
        upward = [run for run in range(sheet.num_runs) if target[run] > source[run]]
        downward = [run for run in range(sheet.num_runs) if target[run] < source[run]]
        for run in (*reversed(upward), *downward):
            for memory_HED in (self.keys_HED, self.values_HED):
                _copy_within(memory_HED, source[run], target[run], sheet.used)


def _copy_within(memory_HED: torch.Tensor, source: int, target: int, count: int) -> None:
    entries_HCD = memory_HED[:, source : source + count]
    if abs(target - source) < count:
        entries_HCD = entries_HCD.clone()
    memory_HED[:, target : target + count] = entries_HCD


def _first(sheet: Sheet) -> int:
    return sheet.first
