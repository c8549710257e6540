"""Parts of a segment: kept entries from one border of groups to another, as segments of their own.

Encoded keys share scales within groups of kept entries (:mod:`rayapp.kv.quantize`). A segment that
is cut only between groups may therefore be packed part by part, each as soon as its entries are
known: the parts, received and joined, equal the segment sent whole, bit for bit. A part is an
ordinary segment, so :func:`rayapp.kv.wire.pack` and :func:`rayapp.kv.wire.unpack` know nothing of
parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rayapp.errors import IntegrityError
from rayapp.kv.segment import BlockKV, KVSegment
from rayapp.plan import KEY_GROUP


def part(segment: KVSegment, begin: int, end: int | None = None) -> KVSegment:
    """The kept entries ``begin`` to ``end`` of every block, as views.

    A block that has fewer entries gives those that it has, which may be none.

    Args:
        segment: The segment, with its KV as prefill left it.
        begin: The first entry of the part, counted over the entries that a block keeps.
        end: The entry after its last one; None is the end of every block.

    Raises:
        IntegrityError: ``begin`` or ``end`` lies inside a group.
    """
    inside = [border for border in (begin, end or 0) if border < 0 or border % KEY_GROUP]
    if inside or (end is not None and end < begin):
        raise IntegrityError(
            f"a part of kept entries {begin} to {end} cannot be encoded alone: both borders are "
            f"ascending multiples of {KEY_GROUP}, the entries that share scales of keys"
        )
    return replace(segment, blocks=tuple(_cut(entry, begin, end) for entry in segment.blocks))


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


def _cut(entry: BlockKV, begin: int, end: int | None) -> BlockKV:
    return replace(
        entry,
        keys_HND=entry.keys_HND[:, begin:end],
        values_HND=entry.values_HND[:, begin:end],
        positions_N=entry.positions_N[begin:end],
    )


def _identity(segment: KVSegment) -> tuple[object, ...]:
    """Everything about a segment but its entries."""
    blocks = tuple((entry.block, entry.encoding) for entry in segment.blocks)
    return replace(segment, blocks=()), blocks


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
