"""Parts of a segment: what a prompt's KV holds already, while the rest of it is still computed.

Encoded keys share scales within groups of kept entries (:mod:`rayapp.kv.quantize`). A segment that
is cut only between groups may therefore be packed part by part, each as soon as its entries are
known: the parts, received and joined, equal the segment sent whole, bit for bit. A part is an
ordinary segment, so :func:`rayapp.kv.wire.pack` and :func:`rayapp.kv.wire.unpack` know nothing of
parts.

Shapes: H = KV heads, T = tokens that prefill runs, N = entries of a part in one block, D = head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from rayapp.errors import IntegrityError
from rayapp.kv.cache import StackShape, held_entries
from rayapp.kv.segment import BlockKV, KVExtent, KVSegment
from rayapp.kv.select import sent_blocks
from rayapp.plan import KEY_GROUP, KVTransfer, PruningPlan


class PartialKV(Protocol):
    """The KV of one prompt, of which the first ``num_done`` of T tokens have been run."""

    num_done: int
    positions_T: torch.Tensor

    def memory(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(1, H, T, D)`` of a block; those from ``num_done`` on are unknown."""
        ...


class PartCutter:
    """Cuts the KV of one prompt into parts, in the order in which its tokens are run.

    Args:
        plan: The plan, which says where decode attends, what travels and how it is encoded.
        stack: The shape of the model.
        extent: The lengths of the prompt.
    """

    def __init__(self, plan: PruningPlan, stack: StackShape, extent: KVExtent) -> None:
        self._plan = plan
        self._stack = stack
        self._extent = extent
        self._ranges = {
            block: kept_ranges(plan.transfer(block), extent.num_prefilled, stack.windows[block])
            for block in sent_blocks(plan, len(stack.windows))
        }
        self._cut = dict.fromkeys(self._ranges, 0)
        self.num_parts = 0

    def num_ready_bytes(self, num_done: int) -> int:
        """Bytes, in the model's own type, of the entries that the next part would have."""
        entry_bytes = 2 * self._stack.num_kv_heads * self._stack.head_dim
        count = sum(self._known(b, num_done) - begin for b, begin in self._cut.items())
        return count * entry_bytes * self._stack.dtype.itemsize

    def cut(self, kv: PartialKV) -> KVSegment:
        """The next part: every kept entry that is known and in no earlier part, up to whole groups.

        Tensors are views of the KV where a block's entries of the part are neighbours. The part
        that follows the last token is the last one, whatever groups it ends in.
        """
        blocks = []
        for block, begin in self._cut.items():
            end = self._known(block, kv.num_done)
            blocks.append(self._block(kv, block, begin, end))
            self._cut[block] = end
        self.num_parts += 1
        return self._extent.segment(blocks)

    def _known(self, block: int, num_done: int) -> int:
        """Number of kept entries of a block that the first tokens have made, in whole groups."""
        counts = (max(0, min(num_done, end) - begin) for begin, end in self._ranges[block])
        known = sum(counts)
        return known if num_done >= self._extent.num_prefilled else known - known % KEY_GROUP

    def _block(self, kv: PartialKV, block: int, begin: int, end: int) -> BlockKV:
        slices = _slices(self._ranges[block], begin, end) or [slice(0)]
        keys_HND, values_HND = (
            _joined([tensor_1HTD[0, :, part] for part in slices], dim=1)
            for tensor_1HTD in kv.memory(block)
        )
        positions_N = _joined([kv.positions_T[part] for part in slices], dim=0)
        encoding = self._plan.transfer(block).encoding
        return BlockKV(block, keys_HND, values_HND, positions_N.to("cpu", torch.int64), encoding)


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


def _slices(ranges: Sequence[tuple[int, int]], begin: int, end: int) -> list[slice]:
    """Kept entries ``begin`` to ``end`` of some ranges of tokens, as slices of tokens."""
    slices, before = [], 0
    for first, last in ranges:
        size = last - first
        low, high = max(0, begin - before), min(size, end - before)
        if low < high:
            slices.append(slice(first + low, first + high))
        before += size
    return slices


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
