"""The pages of all sequences in one group of blocks.

A *group* is a set of blocks that always have the same positions, because the plan cuts them alike
and they share one sliding window. In every group a sequence has a sheet of pages
(:mod:`rayapp.engine.pages`) that grows with it, so no row pays for another's length. Where a sheet
begins, memory decides how far it reaches ahead: all the way where there is plenty, an eighth of its
entries where there is not.

Positions ascend within a sequence, so an entry that fell out of a sliding window never returns; a
windowed group keeps a window's entries and some slack, and slides them down when its sheet is full.
Shapes: B = rows of a step, N = blocks of the group, H = KV heads, G = query heads per KV head,
L = entries, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayapp.engine.attention.sdpa import attend
from rayapp.engine.attention.step import AttentionBackend
from rayapp.engine.pages import Arena, Sheet
from rayapp.engine.sequences.entries import Entries, StoredEntries
from rayapp.engine.sequences.rows import StepRows
from rayapp.errors import IntegrityError
from rayapp.kv.segment import BlockKV

_SPARE = 16
"""One part in this many of all pages stays free when a sequence comes, so that others can grow
without all of them being moved; half of it is enough for moving to pay (project default)."""

SHARED_BYTES = 256 << 10
"""Bytes of KV per block from which on answers share their prompt's pages instead of copying them:
merging two results costs a few small operations per block (project default)."""


class PagedGroup:
    """The KV of blocks that always have entries at the same positions.

    Args:
        blocks: Numbers of the blocks, ascending.
        window: The sliding window of the blocks, None for full attention.
        arena: The memory of the blocks' device.
        max_entries: Most entries that a sequence can ever have.
        is_ample: True if the memory holds the longest sequence in every slot. Then all sheets are
            equally large, so that rows lie evenly.
        backend: The function that attends.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        window: int | None,
        arena: Arena,
        max_entries: int,
        *,
        is_ample: bool,
        backend: AttentionBackend = attend,
    ) -> None:
        self.blocks = blocks
        self.window = window
        self.arena = arena
        self.max_entries = max_entries
        self.is_ample = is_ample
        self._backend = backend
        heads, _, dim = arena.keys_HED.shape
        entry_bytes = 2 * heads * dim * arena.keys_HED.dtype.itemsize
        self.shares_from = None if window else SHARED_BYTES // entry_bytes
        self._rows: StepRows | None = None

    def num_pages_of(self, num_entries: int) -> int:
        """Pages of all runs of a sequence of so many entries, those that it drops left out."""
        return len(self.blocks) * self._pages(min(num_entries, self.max_entries))

    def _pages(self, num_entries: int) -> int:
        return -(-num_entries // self.arena.block_size)

    def take(self, used: int, limit: int, share: float, *, is_alone: bool) -> Entries | None:
        """Take pages for a sequence that comes, or comes back; None if there is too little room.

        Args:
            used: Entries that will be loaded.
            limit: Entries that the sequence may come to.
            share: The share of free pages, of those of all groups, that this sequence may have.
            is_alone: True if there is no other sequence, for which pages must stay free.
        """
        limit = min(limit, self.max_entries)
        lean = self._ahead(used, limit, 8)
        if not (is_alone or self.is_ample) and not self._leaves_spare(lean, _SPARE):
            return None
        generous = _rounded(self._pages(limit), self._pages(self.max_entries))
        if self.is_ample:
            generous = self._pages(self.max_entries)
        elif generous * len(self.blocks) > share * self.arena.pool.num_free:
            generous = lean
        sheet = self._taken((generous, lean))
        if sheet is None:
            return None
        sheet.used = sheet.clean = used
        return Entries(sheet, limit)

    def _taken(self, choices: Sequence[int]) -> Sheet | None:
        """Take a sheet of the first of some numbers of pages per run; move others if need be."""
        pool, num_runs = self.arena.pool, len(self.blocks)
        for pages in choices:
            sheet = pool.take(num_runs, pages)
            if sheet is not None:
                return sheet
        if self._leaves_spare(choices[-1], None):
            pool.compact(self._lean, self.arena.move)
        return pool.take(num_runs, choices[-1])

    def _leaves_spare(self, pages: int, part: int | None) -> bool:
        """Whether runs of ``pages`` find room, and one part of all pages stays free besides.

        Pages beyond what sheets keep when room is short count as free.
        """
        pool = self.arena.pool
        kept = sum(sheet.num_runs * self._lean(sheet) for sheet in pool.sheets)
        spare = pool.num_pages // part if part else 0
        return kept + len(self.blocks) * pages + spare <= pool.num_pages

    def _ahead(self, used: int, limit: int, part: int) -> int:
        """Pages of a run that reaches ahead by one part of its entries, a page at least."""
        ahead = used + max(self.arena.block_size, used // part)
        return self._pages(max(1, min(ahead, limit)))

    def take_answers(
        self, used: int, max_tokens: Sequence[int], share: float, *, is_alone: bool
    ) -> list[Entries]:
        """Take pinned pages for answers to one prompt, fewer where there is no room for all.

        Several answers share the pages of a prompt that is long enough.
        """
        prompt = None
        if len(max_tokens) > 1 and self.shares_from is not None and used >= self.shares_from:
            prompt = self._take_prompt(used)
            if prompt is None:
                return []
        answers = []
        for limit in max_tokens:
            own = used if prompt is None else 0
            held = self.take(own, own + limit, share, is_alone=is_alone)
            if held is None:
                break
            if prompt is not None:
                held.prompt = self.arena.pool.share(prompt)
            for sheet in held.sheets:
                sheet.is_pinned = True
            answers.append(held)
        if prompt is not None:
            self.arena.pool.drop(prompt)
        return answers

    def _take_prompt(self, used: int) -> Sheet | None:
        """Take pages for a prompt that several answers share."""
        sheet = self._taken((self._pages(used),))
        if sheet is not None:
            sheet.used, sheet.is_pinned = used, True
        return sheet

    def _lean(self, sheet: Sheet) -> int:
        """Pages of a run that a sheet of any group keeps when room is short."""
        size = sheet.pages * self.arena.block_size
        return sheet.pages if sheet.is_pinned else self._ahead(sheet.used, size, 8)

    def load_answers(
        self, answers: Sequence[Entries], entries: Sequence[BlockKV], begins: Sequence[int]
    ) -> None:
        """Copy the group's part of a segment into pages from :meth:`take_answers`.

        Args:
            answers: The pages of every answer.
            entries: The next entries of every block, of some blocks perhaps none; those that lie in
                their :meth:`landing_place` already stay there.
            begins: Number of entries of every block that were copied before.
        """
        for sheet in _prompt_sheets(answers):
            for index, (entry, begin) in enumerate(zip(entries, begins, strict=True)):
                keys_HND, values_HND = self._place(sheet, index, begin, entry.num_entries)
                _copy(entry.keys_HND, keys_HND)
                _copy(entry.values_HND, values_HND)

    def landing_place(
        self, answers: Sequence[Entries], block: int, begin: int, num_entries: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``(H, L, D)`` of some entries of a block in the pages of the first answer.

        Args:
            answers: The pages of every answer.
            block: A block of this group.
            begin: The first entry's number.
            num_entries: Number of entries.
        """
        return self._place(_prompt_sheets(answers)[0], self.blocks.index(block), begin, num_entries)

    def _place(
        self, sheet: Sheet, index: int, begin: int, num_entries: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys_HNLD, values_HNLD = self.arena.runs(sheet, begin, begin + num_entries)
        return keys_HNLD[:, index], values_HNLD[:, index]

    def note_positions(self, answers: Sequence[Entries], positions_N: torch.Tensor) -> None:
        """Take note of the positions of the next entries, which a window asks for."""
        if self.window is not None:
            for held in answers:
                held.positions += positions_N.tolist()

    def free(self, held: Entries) -> None:
        """Give up a sequence's pages."""
        for sheet in held.sheets:
            self.arena.pool.drop(sheet)

    def make_room(self, held: Entries, position: int, *, is_alone: bool) -> bool:
        """Make sure that one more entry, at ``position``, finds its place; return whether it does.

        Args:
            held: The sequence's entries.
            position: Position of the entry to come.
            is_alone: True if no other sequence could be set aside, so that no move is too dear.
        """
        if self.window is not None:
            while held.low < held.sheet.used and held.positions[held.low] <= position - self.window:
                held.low += 1
        size = held.sheet.pages * self.arena.block_size
        if held.sheet.used < size:
            return True
        if held.low and size >= held.limit:
            self._slide(held)
            return True
        return self._grow(held, is_alone)

    def _slide(self, held: Entries) -> None:
        """Drop the entries that left the window, and move the others to the sheet's beginning."""
        sheet, low = held.sheet, held.low
        sources = self.arena.runs(sheet, low, sheet.used)
        targets = self.arena.runs(sheet, 0, sheet.used - low)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source.clone())
        del held.positions[:low]
        sheet.used, held.low = sheet.used - low, 0
        sheet.clean = sheet.used

    def _grow(self, held: Entries, is_alone: bool) -> bool:
        sheet, pool = held.sheet, self.arena.pool
        ahead, least = self._ahead(sheet.used, held.limit, 4), sheet.pages + 1
        ahead = max(least, min(_rounded(ahead, ahead * 2), self._pages(held.limit)))
        for pages in (ahead, least):
            if self._resize(held, pages):
                return True
        # Moving all sheets pays only if it makes room for many to grow, not for this one alone.
        if is_alone or self._leaves_spare(least, 2 * _SPARE):
            pool.compact(self._lean, self.arena.move)
            if self._resize(held, least):
                return True
        grown = sheet.num_runs * (least - sheet.pages)
        if is_alone and pool.open_behind(sheet, grown, self.arena.move):
            return self._resize(held, least)
        return False

    def _resize(self, held: Entries, pages: int) -> bool:
        """Give a sheet longer runs, where it lies or in another hole; return whether one is."""
        sheet, pool = held.sheet, self.arena.pool
        if pool.room_behind(sheet) >= sheet.num_runs * (pages - sheet.pages):
            self.arena.move(sheet, sheet.first, pages)
            return True
        hole = pool.take(sheet.num_runs, pages)
        if hole is None:
            return False
        for target, source in zip(
            self.arena.runs(hole, 0, sheet.used), self.arena.runs(sheet, 0, sheet.used), strict=True
        ):
            target.copy_(source)
        hole.used = hole.clean = sheet.used
        pool.drop(sheet)
        held.sheet = hole
        return True

    def put_aside(self, held: Entries) -> StoredEntries:
        """Copy what a sequence still sees to host memory and give up its pages."""
        parts = [self.arena.runs(held.sheet, held.low, held.sheet.used)]
        if held.prompt is not None:
            parts.insert(0, self.arena.runs(held.prompt, 0, held.prompt.used))
        keys_HNLD, values_HNLD = (
            torch.cat(tensors, dim=2).cpu() for tensors in zip(*parts, strict=True)
        )
        before = 0 if held.prompt is None else held.prompt.used
        self.free(held)
        positions = held.positions[held.low :]
        return StoredEntries(keys_HNLD, values_HNLD, positions, held.limit + before)

    def bring_back(self, stored: StoredEntries, share: float, *, is_alone: bool) -> Entries | None:
        """Copy entries back into pages; None if there is no room."""
        count = stored.keys_HNLD.shape[2]
        held = self.take(count, stored.limit, share, is_alone=is_alone)
        if held is None:
            return None
        keys_HNLD, values_HNLD = self.arena.runs(held.sheet, 0, count)
        keys_HNLD.copy_(stored.keys_HNLD)
        values_HNLD.copy_(stored.values_HNLD)
        held.positions = list(stored.positions)
        return held

    def begin_step(self, rows: Sequence[Entries], positions: Sequence[int]) -> None:
        """Claim an entry in every row, which :meth:`make_room` has made room for."""
        for held, position in zip(rows, positions, strict=True):
            held.sheet.used += 1
            held.sheet.clean = max(held.sheet.clean, held.sheet.used)
            if self.window is not None:
                held.positions.append(position)
        self._rows = StepRows(self.arena, rows, len(self.blocks))

    @property
    def rows(self) -> StepRows:
        """The rows of the step that has begun."""
        if self._rows is None:
            raise IntegrityError(f"blocks {list(self.blocks)} run before their step has begun")
        return self._rows

    def attend(
        self,
        query_BHGD: torch.Tensor,
        keys_BH1D: torch.Tensor,
        values_BH1D: torch.Tensor,
        index: int,
        scale: float,
    ) -> torch.Tensor:
        """Write the step's entries of block ``index``, then attend over all that rows see."""
        rows = self.rows
        rows.write(keys_BH1D, values_BH1D, index)
        return self._backend(query_BHGD, rows.step, index, scale)

    def check(self, held: Entries) -> None:
        """Raise :class:`IntegrityError` with the numbers if a sequence's pages cannot be right."""
        sheet, prompt = held.sheet, held.prompt
        size = sheet.pages * self.arena.block_size
        is_right = 0 <= held.low <= sheet.used <= size and sheet.num_runs == len(self.blocks)
        if self.window is not None and not sheet.is_pinned:
            is_right = is_right and len(held.positions) == sheet.used
        if prompt is not None:
            is_right = is_right and prompt.num_runs == len(self.blocks)
        if not is_right:
            raise IntegrityError(
                f"blocks {list(self.blocks)}: a page table with {sheet.num_runs} runs of {size} "
                f"entries, {sheet.used} of them used, {held.low} out of the window, "
                f"{len(held.positions)} positions"
            )


def _prompt_sheets(answers: Sequence[Entries]) -> list[Sheet]:
    """The sheets with the prompt of some answers: the one that they share, or all of theirs."""
    shared = answers[0].prompt
    return [held.sheet for held in answers] if shared is None else [shared]


def _copy(source_HLD: torch.Tensor, target_HLD: torch.Tensor) -> None:
    if source_HLD.data_ptr() != target_HLD.data_ptr():
        target_HLD.copy_(source_HLD)


def _rounded(pages: int, most: int) -> int:
    """Round up to one of four sizes per power of two, at most ``most``, so sheets are alike."""
    unit = 1 << max(0, pages.bit_length() - 3)
    return min(-(-pages // unit) * unit, most)
