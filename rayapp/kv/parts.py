"""Parts of a segment: what a prompt's KV holds already, while the rest of it is still computed.

Encoded keys share scales within groups of kept entries (:mod:`rayapp.kv.quantize`). A segment that
is cut only between groups may therefore be packed part by part, each as soon as its entries are
known: the parts, received and joined, equal the segment sent whole, bit for bit. A part is an
ordinary segment, so :func:`rayapp.kv.wire.pack` and :func:`rayapp.kv.wire.unpack` know nothing of
parts. Blocks are computed one after the other, so within a pass a part has entries of the blocks
that have run, and none of the others.

Shapes: H = KV heads, T = tokens that prefill runs, N = entries of a part in one block, D = head
dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from rayapp.errors import IntegrityError
from rayapp.kv.cache import StackShape, held_entries
from rayapp.kv.segment import BlockKV, KVExtent, KVSegment
from rayapp.kv.select import sent_blocks
from rayapp.plan import KEY_GROUP, Encoding, KVTransfer, PruningPlan


class PartialKV(Protocol):
    """The KV of one prompt while its T tokens are run; what is known of it never changes."""

    positions_T: torch.Tensor

    def num_known(self, block: int) -> int:
        """Number of tokens, from the first on, whose entries of a block are known."""
        ...

    def memory(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(1, H, T, D)`` of a block, known or not; T is 0 if none is known."""
        ...


@dataclass(frozen=True)
class Span:
    """Neighbours among the kept entries of one block, as the slices of tokens that made them."""

    block: int
    slices: tuple[slice, ...]
    encoding: Encoding

    def of(self, kv: PartialKV) -> BlockKV:
        """The entries, as views of the KV if their tokens are neighbours too."""
        slices = self.slices or (slice(0),)
        keys_HND, values_HND = (
            _joined([tensor_1HTD[0, :, part] for part in slices], dim=1)
            for tensor_1HTD in kv.memory(self.block)
        )
        positions_N = _joined([kv.positions_T[part] for part in slices], dim=0)
        positions_N = positions_N.to("cpu", torch.int64)
        return BlockKV(self.block, keys_HND, values_HND, positions_N, self.encoding)


@dataclass(frozen=True)
class Part:
    """A part of a prompt's KV that has been cut; its segment can be made on any thread."""

    extent: KVExtent
    kv: PartialKV
    spans: tuple[Span, ...]

    def segment(self) -> KVSegment:
        """The part's entries, while the pass goes on that computes later ones."""
        return self.extent.segment(span.of(self.kv) for span in self.spans)


class PartCutter:
    """Cuts the KV of one prompt into parts, in the order in which its entries come to be known.

    Parts may be cut beside the engine while a pass runs; cutting only counts entries.

    Args:
        plan: The plan, which says where decode attends, what travels and how it is encoded.
        stack: The shape of the model.
        extent: The lengths of the prompt.
    """

    def __init__(self, plan: PruningPlan, stack: StackShape, extent: KVExtent) -> None:
        self._plan = plan
        self._extent = extent
        self._ranges = {
            block: kept_ranges(plan.transfer(block), extent.num_prefilled, stack.windows[block])
            for block in sent_blocks(plan, len(stack.windows))
        }
        self._sizes = {b: sum(map(_size, ranges)) for b, ranges in self._ranges.items()}
        self._entry_bytes = 2 * stack.num_kv_heads * stack.head_dim * stack.dtype.itemsize
        self._cut = dict.fromkeys(self._ranges, 0)
        self._is_open = True
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes, in the model's own type, of all entries that travel."""
        return self._entry_bytes * sum(self._sizes.values())

    def num_ready_bytes(self, kv: PartialKV) -> int:
        """Bytes, in the model's own type, of the entries that the next part would have."""
        return self._entry_bytes * sum(self._known(kv, b) - cut for b, cut in self._cut.items())

    def cut(self, kv: PartialKV, *, least_bytes: int = 1) -> Part | None:
        """The next part: every kept entry that is known and in no earlier part, in whole groups.

        It names blocks without such entries too. None if it would be smaller than ``least_bytes``
        in the model's own type, if nothing would be left for :meth:`rest`, or after that.
        """
        with self._lock:
            known = {block: self._known(kv, block) for block in self._cut}
            num_new = sum(known.values()) - sum(self._cut.values())
            is_small = self._entry_bytes * num_new < least_bytes
            if not self._is_open or is_small or known == self._sizes:
                return None
            return self._next(kv, known)

    def rest(self, kv: PartialKV) -> Part:
        """The last part, once all tokens have been run: whatever is in no part, or everything."""
        with self._lock:
            self._is_open = False
            return self._next(kv, self._sizes)

    def _next(self, kv: PartialKV, ends: dict[int, int]) -> Part:
        spans = tuple(
            Span(
                block,
                tuple(_slices(self._ranges[block], begin, ends[block])),
                self._plan.transfer(block).encoding,
            )
            for block, begin in self._cut.items()
        )
        self._cut = dict(ends)
        return Part(self._extent, kv, spans)

    def _known(self, kv: PartialKV, block: int) -> int:
        """Number of kept entries of a block that are known, in whole groups."""
        num_tokens = kv.num_known(block)
        counts = (max(0, min(num_tokens, end) - begin) for begin, end in self._ranges[block])
        known = sum(counts)
        return known if num_tokens >= self._extent.num_prefilled else known - known % KEY_GROUP


def kept_ranges(
    rule: KVTransfer, num_tokens: int, window: int | None
) -> tuple[tuple[int, int], ...]:
    """The tokens whose entries of a block travel, as ascending ranges ``(begin, end)`` of T."""
    num_entries = held_entries(num_tokens, window)
    first, last = rule.counts(num_entries)
    begin = num_tokens - num_entries
    if first + last == num_entries:
        return ((begin, num_tokens),) if num_entries else ()
    ranges = ((begin, begin + first), (num_tokens - last, num_tokens))
    return tuple(each for each in ranges if each[0] < each[1])


def joined(parts: Sequence[KVSegment]) -> KVSegment:
    """The segment whose parts these are, in order.

    Raises:
        IntegrityError: There is no part, or the parts are of different prompts or blocks, or not
            in order.
    """
    if not parts:
        raise IntegrityError("a segment has at least one part, got none; join what arrived")
    whole = parts[0]
    for each in parts[1:]:
        if _identity(each) != _identity(whole):
            raise IntegrityError(
                f"parts {_identity(whole)} and {_identity(each)} are of different segments; "
                f"join parts of one request only"
            )
    return replace(whole, blocks=tuple(map(_joined_block, *(each.blocks for each in parts))))


def _slices(ranges: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[slice]:
    """Kept entries ``begin`` to ``end`` of some ranges of tokens, as slices of tokens."""
    before = 0
    for tokens in ranges:
        low, high = max(0, begin - before), min(_size(tokens), end - before)
        if low < high:
            yield slice(tokens[0] + low, tokens[0] + high)
        before += _size(tokens)


def _size(tokens: tuple[int, int]) -> int:
    return tokens[1] - tokens[0]


def _joined(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """One tensor of neighbouring pieces, a view if there is one piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=dim)


def _identity(segment: KVSegment) -> tuple[object, ...]:
    """Everything about a segment but its entries."""
    return segment.extent, tuple((entry.block, entry.encoding) for entry in segment.blocks)


def _joined_block(*pieces: BlockKV) -> BlockKV:
    positions_N = torch.cat([piece.positions_N for piece in pieces])
    if bool((positions_N.diff() <= 0).any()):
        raise IntegrityError(
            f"block {pieces[0].block}: its parts do not ascend ({positions_N.tolist()}); join "
            f"every part once, in prompt order"
        )
    return replace(
        pieces[0],
        keys_HND=torch.cat([piece.keys_HND for piece in pieces], dim=1),
        values_HND=torch.cat([piece.values_HND for piece in pieces], dim=1),
        positions_N=positions_N,
    )
