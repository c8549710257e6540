"""The header of a KV message describes its content as strictly validated JSON.

Sizes are bounded and must agree with each other and with the message before anything is allocated,
so the largest allocation that a hostile header can cause is a small multiple of the message itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayapp.errors import WireError
from rayapp.kv.quantize import buffer_sizes
from rayapp.plan import Encoding

ALIGNMENT = 64
MAX_HEADER_BYTES = 4 << 20
MAX_BLOCKS = 4096
MAX_TOKENS = 1 << 24
MAX_WIDTH = 1 << 16

DTypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES: dict[torch.dtype, DTypeName] = {dtype: name for name, dtype in DTYPES.items()}

TokenCount = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Run = tuple[TokenCount, Annotated[int, Field(ge=1, le=MAX_TOKENS)]]


def aligned(num_bytes: int) -> int:
    """Round ``num_bytes`` up to the alignment of buffers."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BlockHeader(_Strict):
    """The header of one block: where its buffers begin, and the positions of its entries.

    Offsets count from the end of the message's header. ``runs`` are ``(first position, length)``
    pairs, ascending, which neither touch nor overlap.
    """

    block: Annotated[int, Field(ge=0, lt=MAX_BLOCKS)]
    encoding: Encoding
    num_entries: TokenCount
    runs: Annotated[tuple[Run, ...], Field(max_length=MAX_TOKENS)]
    offsets: Annotated[tuple[int, ...], Field(min_length=2, max_length=4)]

    @model_validator(mode="after")
    def _runs_are_consistent(self) -> BlockHeader:
        total = sum(length for _, length in self.runs)
        if total != self.num_entries:
            raise ValueError(f"block {self.block}: runs hold {total} of {self.num_entries} entries")
        for (start, length), (following, _) in itertools.pairwise(self.runs):
            if start + length >= following:
                raise ValueError(f"block {self.block}: runs at {start} and {following} overlap")
        return self


class Header(_Strict):
    """The header of a message; its names and limits define version 3 of the wire format."""

    request_id: Annotated[str, Field(max_length=256)]
    attempt: Annotated[int, Field(ge=0, lt=2**31)]
    plan_fingerprint: Annotated[str, Field(max_length=256)]
    weights_fingerprint: Annotated[str, Field(max_length=256)]
    part: Annotated[int, Field(ge=0, lt=2**31)] = 0
    is_last: bool = True
    num_prompt_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    num_prefilled: TokenCount
    num_visual_tokens_removed: TokenCount = 0
    is_compact: bool = False
    dtype: DTypeName
    num_kv_heads: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    head_dim: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    blocks: Annotated[tuple[BlockHeader, ...], Field(max_length=MAX_BLOCKS)]

    @model_validator(mode="after")
    def _is_consistent(self) -> Header:
        kept = self.num_prompt_tokens - self.num_visual_tokens_removed
        if kept < 1 or not kept - 1 <= self.num_prefilled <= kept:
            raise ValueError(
                f"num_prefilled={self.num_prefilled} must be "
                f"num_prompt_tokens={self.num_prompt_tokens} without "
                f"num_visual_tokens_removed={self.num_visual_tokens_removed}, or one less"
            )
        # Positions that are not compact have gaps where tokens were removed.
        gaps = 0 if self.is_compact else self.num_visual_tokens_removed
        numbers = [entry.block for entry in self.blocks]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"blocks {numbers} must ascend without repetition")
        for entry in self.blocks:
            if entry.runs and sum(entry.runs[-1]) > self.num_prefilled + gaps:
                raise ValueError(
                    f"block {entry.block}: positions end at {sum(entry.runs[-1]) - 1}, past the "
                    f"{self.num_prefilled + gaps} tokens that were prefilled or removed"
                )
        self._check_offsets()
        return self

    def _check_offsets(self) -> None:
        """Refuse any layout but the valid one: buffers in order, on the next aligned offset."""
        expected = layout([self.sizes(entry) for entry in self.blocks])[0]
        for entry, offsets in zip(self.blocks, expected, strict=True):
            if entry.offsets != offsets:
                raise ValueError(
                    f"block {entry.block}: offsets {entry.offsets} should be {offsets} "
                    f"for its shape"
                )

    def sizes(self, entry: BlockHeader) -> tuple[int, ...]:
        """Number of bytes of every buffer of the block ``entry``."""
        itemsize = DTYPES[self.dtype].itemsize
        return buffer_sizes(
            entry.encoding, self.num_kv_heads, entry.num_entries, self.head_dim, itemsize
        )

    @property
    def payload_bytes(self) -> int:
        """Number of bytes of all buffers, without padding."""
        return sum(sum(self.sizes(entry)) for entry in self.blocks)

    @property
    def body_bytes(self) -> int:
        """Number of bytes after the header, padding included."""
        return layout([self.sizes(entry) for entry in self.blocks])[1]

    def dump(self) -> bytes:
        """Write compact JSON in UTF-8; fields for visual pruning appear only in its messages."""
        return self.model_dump_json(exclude_defaults=True).encode()

    @classmethod
    def parse(cls, text: bytes) -> Header:
        """Parse a header; a :class:`WireError` names the path of the first broken rule."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            path = ".".join(str(part) for part in first["loc"]) or "header"
            raise WireError(
                f"the KV message's header breaks a rule at {path}: {first['msg']}; prefill again"
            ) from None


def layout(sizes: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], int]:
    """Aligned offsets of the buffers of every block after the header, and the last buffer's end."""
    offsets, end = [], 0
    for block_sizes in sizes:
        begins = []
        for size in block_sizes:
            begins.append(end)
            end = aligned(end + size)
        offsets.append(tuple(begins))
    return offsets, end


def runs_of(positions_N: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Write ascending positions as ``(first position, length)`` runs."""
    if not len(positions_N):
        return ()
    breaks = torch.nonzero(positions_N.diff() != 1)[:, 0] + 1
    begins = [0, *breaks.tolist()]
    firsts = positions_N[begins].tolist()
    ends = [*begins[1:], len(positions_N)]
    return tuple(
        (first, end - begin) for first, begin, end in zip(firsts, begins, ends, strict=True)
    )


def positions_of(runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Positions of ``runs`` as int64; the inverse of :func:`runs_of`."""
    pieces = [torch.arange(start, start + length) for start, length in runs]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
