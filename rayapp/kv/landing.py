"""KV lands: a message is copied to where its KV is to stay, and checked while it is copied.

A receiver that has taken pages reads a message's header, which is small, and knows from it where
every byte of the body belongs. So the body moves once: out of a store's shared memory, or over a
link that reads memory which the sender registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from rayapp.kv.header import DTYPES, BlockHeader, Header, aligned
from rayapp.kv.pieces import Arrival, Bytes, pieces_of
from rayapp.kv.segment import KVSegment
from rayapp.kv.wire import (
    Envelope,
    check_digest,
    digest_of,
    read_head,
    segment_of,
    types_of,
)


class Landing(Protocol):
    """Where the KV of a message is to stay."""

    def place(self, block: int, num_entries: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return memory for a block's next entries, keys and values ``(H, N, D)``.

        None if the block or so many entries have no place; then they get memory of their own.
        """
        ...


def land(message: Arrival, expected: Envelope, landing: Landing | None = None) -> KVSegment:
    """Copy the KV of a message to where it is to stay, and check it while it is copied.

    Blocks in the model's own type are copied once, so the segment's tensors are the places that
    ``landing`` names. **They hold KV only if this returns**: those of a damaged message hold
    anything. Quantised blocks, and those without a place, get memory of their own.

    Args:
        message: The message, whose body may lie elsewhere.
        expected: The envelope that it must have.
        landing: Where KV is to stay; by default in memory of its own.

    Raises:
        WireError: The message is damaged or malformed, or its envelope is not ``expected``.
        TransferError: The message was released or lost.
    """
    header, body_at = read_head(message, expected)
    digest = digest_of([message.head[:body_at]])
    buffers = [_buffers(header, entry, landing) for entry in header.blocks]
    places = [place for b in buffers for buffer in b for place in _rows_to_fill(buffer)]
    message.read(body_at, places, lambda copied: digest.update(copied.data))
    check_digest(message, digest)
    return segment_of(header, buffers)


def _buffers(
    header: Header, entry: BlockHeader, landing: Landing | None
) -> tuple[torch.Tensor, ...]:
    """Memory for the buffers of a block: the place where it is to stay, if it can be read there."""
    if landing is not None and entry.encoding == "model":
        places = landing.place(entry.block, entry.num_entries)
        shape = (header.num_kv_heads, entry.num_entries, header.head_dim)
        if places and all(_is_place(place, shape, DTYPES[header.dtype]) for place in places):
            return places
    sizes = zip(header.sizes(entry), types_of(header, entry), strict=True)
    return tuple(torch.empty(size // of.itemsize, dtype=of) for size, of in sizes)


def _is_place(place: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a block's bytes can be read into a tensor, one run of bytes per head."""
    is_like = place.shape == shape and place.dtype == dtype and place.device.type == "cpu"
    return is_like and place[0].is_contiguous()


def _rows_to_fill(buffer: torch.Tensor) -> Iterator[Bytes]:
    """The memory of a buffer in order, and what its padding is read into."""
    yield from pieces_of(buffer)
    yield np.empty(aligned(buffer.nbytes) - buffer.nbytes, dtype=np.uint8)
