"""Paged KV of a decode stage: all groups of its blocks, in one arena of pages per device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rayapp.engine.pages import Arena
from rayapp.engine.sequences.entries import Entries, StoredEntries
from rayapp.engine.sequences.group import PagedGroup
from rayapp.engine.sequences.memory import KVMemory
from rayapp.errors import InputError, WireError
from rayapp.kv.cache import held_entries
from rayapp.kv.segment import BlockKV, KVExtent, KVSegment
from rayapp.models.passes.single_token import AttendingCache
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

SequenceKV = tuple[Entries, ...]
"""The entries of one sequence, by group."""

StoredKV = tuple[StoredEntries, ...]
"""The entries of a sequence that was set aside, by group."""


@dataclass(frozen=True)
class Loaded:
    """What of a prompt's KV has been copied into pages.

    ``counts`` are entries by block, in ascending order of blocks. ``positions`` are those of the
    entries by group of blocks; blocks of a group are alike, but some may be behind others.
    """

    counts: tuple[int, ...]
    positions: tuple[torch.Tensor, ...]


class PagedKV(AttendingCache):
    """All groups of one decode stage; the cache of steps of one token per running sequence.

    Args:
        stack: The blocks of the decode stage.
        plan: The plan, which says which blocks attend and how their KV was cut.
        max_num_seqs: Number of sequences that run at once.
        max_model_len: Most entries of a sequence in one block.
        memory: The memory for keys and values, and the size of a page.

    Raises:
        InputError: The memory does not hold one sequence of ``max_model_len`` entries.
    """

    def __init__(
        self,
        stack: BlockStack,
        plan: PruningPlan,
        *,
        max_num_seqs: int,
        max_model_len: int,
        memory: KVMemory,
    ) -> None:
        block_size = memory.block_size
        self._shape_HD = (stack.num_kv_heads, stack.head_dim)
        self._dtype = stack.dtype
        self._max_model_len = max_model_len
        self._page_bytes = (
            2 * block_size * stack.num_kv_heads * stack.head_dim * stack.dtype.itemsize
        )
        alike = _alike(stack, plan)
        most = [
            _max_entries(stack.windows[blocks[0]], max_model_len, block_size) for blocks in alike
        ]
        longest = [len(b) * -(-m // block_size) for b, m in zip(alike, most, strict=True)]
        self._longest = sum(longest)
        num_pages = self._num_pages(max_num_seqs, memory.num_bytes)
        self.arenas: list[Arena] = []
        groups = []
        for device in dict.fromkeys(stack.devices[blocks[0]] for blocks in alike):
            here = [n for n, blocks in enumerate(alike) if stack.devices[blocks[0]] == device]
            # Every device gets pages for its share of a sequence.
            pages = num_pages * sum(longest[n] for n in here) // self._longest
            arena = Arena(pages, block_size, self._shape_HD, stack.dtype, device)
            self.arenas.append(arena)
            is_ample = num_pages == max_num_seqs * self._longest
            groups += [
                PagedGroup(alike[n], stack.windows[alike[n][0]], arena, most[n], is_ample=is_ample)
                for n in here
            ]
        self.groups = tuple(groups)
        self._rules = [plan.transfer(group.blocks[0]) for group in self.groups]
        self.blocks = tuple(sorted(block for group in self.groups for block in group.blocks))
        self._places = {
            block: (group, index)
            for group in self.groups
            for index, block in enumerate(group.blocks)
        }

    def _num_pages(self, max_num_seqs: int, num_bytes: int | None) -> int:
        most = max_num_seqs * self._longest
        if num_bytes is None:
            return most
        num_pages = num_bytes // self._page_bytes if self._page_bytes else 0
        if num_pages < self._longest:
            need = self._longest * self._page_bytes
            raise InputError(
                f"{num_bytes:,} bytes of KV memory cannot hold one sequence of "
                f"{self._max_model_len} tokens, which takes {need:,} bytes, {need - num_bytes:,} "
                "more; raise --kv-memory or lower --max-model-len"
            )
        return min(most, num_pages)

    @property
    def nbytes(self) -> int:
        """Number of bytes of keys and values, in use or not."""
        return sum(arena.nbytes for arena in self.arenas)

    @property
    def num_pages(self) -> int:
        """Number of all pages; 0 if no block attends."""
        return sum(arena.pool.num_pages for arena in self.arenas)

    @property
    def num_filled(self) -> int:
        """Number of pages with an entry; shared ones count once."""
        return sum(arena.pool.num_filled(arena.block_size) for arena in self.arenas)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the memory holds, in sequences of ``max_model_len`` tokens."""
        return self.num_pages * self._max_model_len // self._longest if self._longest else 0

    def num_entries(self, extent: KVExtent) -> tuple[int, ...]:
        """Number of entries that the KV of a prompt has under the plan, by groups."""
        return tuple(
            sum(rule.counts(held_entries(extent.num_prefilled, group.window)))
            for group, rule in zip(self.groups, self._rules, strict=True)
        )

    def num_pages_of(self, extent: KVExtent, num_tokens: int) -> int:
        """Number of pages that a sequence comes to.

        Args:
            extent: The lengths of its prompt.
            num_tokens: Answer tokens whose KV follows.
        """
        return sum(
            group.num_pages_of(count + num_tokens)
            for group, count in zip(self.groups, self.num_entries(extent), strict=True)
        )

    def take(
        self,
        extent: KVExtent,
        max_tokens: Sequence[int],
        num_free: int,
        *,
        is_alone: bool,
    ) -> list[SequenceKV] | None:
        """Take pinned pages for answers to one prompt, all or none; None if there is no room.

        Args:
            extent: The lengths of the prompt whose KV will be loaded.
            max_tokens: Most tokens of every answer.
            num_free: Free slots, which share the free pages.
            is_alone: True if there is no other sequence.
        """
        share = self._share(num_free)
        taken: list[list[Entries]] = [[] for _ in max_tokens]
        for group, count in zip(self.groups, self.num_entries(extent), strict=True):
            held = group.take_answers(count, max_tokens, share, is_alone=is_alone)
            for mine, entries in zip(taken, held, strict=False):
                mine.append(entries)
            if len(held) < len(taken):
                for mine in taken:
                    self.free(mine)
                return None
        return [tuple(mine) for mine in taken]

    def _share(self, num_free: int) -> float:
        return 1 / max(1, num_free)

    def nothing_loaded(self) -> Loaded:
        """The beginning of copying a prompt's KV."""
        none_N = torch.empty(0, dtype=torch.int64)
        return Loaded((0,) * len(self.blocks), (none_N,) * len(self.groups))

    def num_missing(self, extent: KVExtent, loaded: Loaded) -> int:
        """Number of entries of a prompt, over all blocks, that have not been copied."""
        counts = zip(self.groups, self.num_entries(extent), strict=True)
        return sum(len(group.blocks) * count for group, count in counts) - sum(loaded.counts)

    def landing_place(
        self,
        answers: Sequence[SequenceKV],
        extent: KVExtent,
        loaded: Loaded,
        block: int,
        num_entries: int,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views ``(H, L, D)`` of the pages into which a block's next entries are copied.

        None if decode does not attend in the block, or the plan sends fewer entries.
        """
        if block not in self._places:
            return None
        group, _ = self._places[block]
        number = self.groups.index(group)
        begin = loaded.counts[self.blocks.index(block)]
        if begin + num_entries > self.num_entries(extent)[number]:
            return None
        return group.landing_place([mine[number] for mine in answers], block, begin, num_entries)

    def load(self, answers: Sequence[SequenceKV], segment: KVSegment, loaded: Loaded) -> Loaded:
        """Copy a segment, or the next part of one, into pages from :meth:`take`, on any thread.

        Args:
            answers: The pages of all answers to the prompt.
            segment: What follows the entries that have been copied; blocks may be at different
                entries, and some may have none. What lies in its place already stays there.
            loaded: What has been copied before.

        Returns:
            What has been copied then.

        Raises:
            WireError: The segment is not exactly what comes next; nothing was copied.
        """
        after = self._check_next(segment, loaded)
        by_block = {entry.block: entry for entry in segment.blocks}
        begins = dict(zip(self.blocks, loaded.counts, strict=True))
        for number, group in enumerate(self.groups):
            held = [mine[number] for mine in answers]
            group.load_answers(
                held, [by_block[b] for b in group.blocks], [begins[b] for b in group.blocks]
            )
            group.note_positions(held, after.positions[number][len(loaded.positions[number]) :])
        return after

    def _check_next(self, segment: KVSegment, loaded: Loaded) -> Loaded:
        """What is loaded with this segment; :class:`WireError` if it is not what this stage needs.

        Entries of a block follow those before them, at the positions of the other blocks of its
        group, and there are never more than the plan sends.
        """
        blocks = tuple(entry.block for entry in segment.blocks)
        if blocks != self.blocks:
            raise WireError(
                f"the KV segment holds blocks {list(blocks)}, decode attends in blocks "
                f"{list(self.blocks)}; "
                "prefill and decode must run the same plan"
            )
        by_block = {entry.block: entry for entry in segment.blocks}
        counts, positions = dict(zip(blocks, loaded.counts, strict=True)), list(loaded.positions)
        for number, (group, most) in enumerate(
            zip(self.groups, self.num_entries(segment.extent), strict=True)
        ):
            for block in group.blocks:
                entry = by_block[block]
                self._check_layout(entry)
                positions[number] = _with_next(positions[number], entry, counts[block], most)
                counts[block] += entry.num_entries
        return Loaded(tuple(counts.values()), tuple(positions))

    def _check_layout(self, entry: BlockKV) -> None:
        heads, dim = self._shape_HD
        shape = (heads, entry.num_entries, dim)
        layouts = {(t.dtype, tuple(t.shape)) for t in (entry.keys_HND, entry.values_HND)}
        if layouts != {(self._dtype, shape)}:
            raise WireError(
                f"block {entry.block} has keys and values {layouts}, expected {self._dtype} "
                f"{shape}; prefill again"
            )

    def unpin(self, answers: Iterable[SequenceKV]) -> None:
        """Let pages be moved, once nobody copies into them any more."""
        for sheet in (sheet for mine in answers for held in mine for sheet in held.sheets):
            sheet.is_pinned = False

    def free(self, held: Sequence[Entries]) -> None:
        """Give up a sequence's pages, in every group that it has any in."""
        for group, entries in zip(self.groups, held, strict=False):
            group.free(entries)

    def make_room(self, held: SequenceKV, position: int, *, is_alone: bool) -> bool:
        """Make sure that one more entry finds its place in every group; return whether it does."""
        return all(
            group.make_room(entries, position, is_alone=is_alone)
            for group, entries in zip(self.groups, held, strict=True)
        )

    def put_aside(self, held: SequenceKV) -> StoredKV:
        """Copy a sequence's entries to host memory and give up its pages."""
        return tuple(
            group.put_aside(entries) for group, entries in zip(self.groups, held, strict=True)
        )

    def bring_back(self, stored: StoredKV, num_free: int, *, is_alone: bool) -> SequenceKV | None:
        """Copy a sequence's entries back into pages; None if there is no room."""
        back: list[Entries] = []
        for group, entries in zip(self.groups, stored, strict=True):
            held = group.bring_back(entries, self._share(num_free), is_alone=is_alone)
            if held is None:
                self.free(back)
                return None
            back.append(held)
        return tuple(back)

    @staticmethod
    def place(held: SequenceKV) -> tuple[int, int]:
        """A number by which sequences with like sheets are neighbours, by page."""
        return (held[0].sheet.pages, held[0].sheet.first) if held else (0, 0)

    def begin_step(self, rows: Sequence[SequenceKV], positions: Sequence[int]) -> None:
        """Claim an entry in every row and block."""
        for number, group in enumerate(self.groups):
            group.begin_step([row[number] for row in rows], positions)

    def masks(self) -> dict[int, torch.Tensor | None]:
        """The step's masks by block, for blocks that run as modules."""
        return {
            block: mask
            for group in self.groups
            if (mask := group.rows.mask()) is not None
            for block in group.blocks
        }

    def attend(
        self,
        query_BHGD: torch.Tensor,
        keys_BH1D: torch.Tensor,
        values_BH1D: torch.Tensor,
        block: int,
        scale: float,
    ) -> torch.Tensor:
        """Write the step's entries of ``block``, then attend over all that rows see."""
        group, index = self._places[block]
        return group.attend(query_BHGD, keys_BH1D, values_BH1D, index, scale)

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's entries of ``block``; gather the KV ``(B, H, K, D)`` that rows see."""
        group, index = self._places[block]
        group.rows.write(keys_BHTD, values_BHTD, index)
        return group.rows.gathered(index)

    def check_integrity(self, page_tables: Iterable[SequenceKV]) -> None:
        """Raise :class:`IntegrityError` if page tables and pools disagree.

        Args:
            page_tables: The page tables of all sequences and reservations.
        """
        tables = list(page_tables)
        for arena in self.arenas:
            mine = [n for n, group in enumerate(self.groups) if group.arena is arena]
            arena.pool.check(sheet for row in tables for n in mine for sheet in row[n].sheets)
        for row in tables:
            for group, entries in zip(self.groups, row, strict=True):
                group.check(entries)


def _with_next(known_N: torch.Tensor, entry: BlockKV, begin: int, most: int) -> torch.Tensor:
    """The positions of a group's entries once a block has its next ones, from ``begin`` on.

    Raises:
        WireError: They are not those that other blocks have there, do not follow the last, or are
            more than ``most``.
    """
    here_N = known_N[begin : begin + entry.num_entries]
    tail_N = entry.positions_N[len(here_N) :]
    is_next = not len(tail_N) or not len(known_N) or bool(tail_N[0] > known_N[-1])
    is_alike = torch.equal(entry.positions_N[: len(here_N)], here_N)
    if not is_next or not is_alike or begin + entry.num_entries > most:
        first = int(entry.positions_N[0]) if entry.num_entries else -1
        raise WireError(
            f"block {entry.block}: {entry.num_entries} entries from position {first} on came after "
            f"{begin} of {most}, and the block's group has {len(known_N)}; they came twice, are "
            "another prompt's, or are not at the positions of the group's other blocks: prefill "
            "again"
        )
    return torch.cat([known_N, tail_N]) if len(tail_N) else known_N


def _max_entries(window: int | None, max_model_len: int, block_size: int) -> int:
    """Most entries of a sequence: a window's, and as many more as are dropped at once."""
    if window is None:
        return max_model_len
    return min(max_model_len, window + max(block_size, window // 4))


def _alike(stack: BlockStack, plan: PruningPlan) -> list[tuple[int, ...]]:
    """Group the blocks where decode attends by device, rule and window, so by equal entries."""
    groups: dict[object, list[int]] = {}
    for block in range(stack.num_blocks):
        if stack.attends[block]:
            rule = plan.transfer(block)
            alike = (rule.first, rule.last, stack.windows[block], stack.devices[block])
            groups.setdefault(alike, []).append(block)
    return [tuple(blocks) for blocks in groups.values()]
