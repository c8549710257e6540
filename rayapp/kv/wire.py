"""The wire format of a KV segment: prefix, JSON header, aligned raw buffers; no pickle anywhere.

::

    0   8  magic           32  8  zero
    8   4  version         40  8  zero
    12  4  header bytes    48  8  zero
    16  8  message bytes   56  8  XXH3-64 of everything else
    24  8  zero
    64     header, padded to 64; then per block and buffer: raw bytes, padded to 64

Little endian. The checksum covers the prefix too, padding is zero, and only one layout is valid for
a given content, so any flipped bit is noticed. A checksum guards against corruption, not against
forgery: a forged message can lie about numbers, never about sizes (see :mod:`rayapp.kv.header`).
XXH3 reads memory about as fast as it can be read, so that a checksum costs less than a copy. The
first piece of a message holds at least the prefix and the header.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import xxhash
from pydantic import ValidationError

from rayapp.errors import IntegrityError, WireError
from rayapp.kv.header import (
    DTYPE_NAMES,
    DTYPES,
    MAX_HEADER_BYTES,
    BlockHeader,
    Header,
    aligned,
    layout,
    positions_of,
    runs_of,
)
from rayapp.kv.pieces import Arrival, Bytes, Message, pieces_of
from rayapp.kv.quantize import SCALE_DTYPE, buffer_sizes, decode, encode
from rayapp.kv.segment import BlockKV, KVExtent, KVSegment
from rayapp.plan import Encoding

if sys.byteorder != "little":
    raise ImportError("KV messages are little endian, this machine is not")

MAGIC = b"RAYAPPKV"
VERSION = 3
"""Version of the format. The first had one scale of encoded keys per channel and message, the
second a CRC-32 and no parts; both are refused, since a message never outlives the two replicas that
it travels between."""
PREFIX_BYTES = 64
_PREFIX = struct.Struct("<8sIIQ")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = 56
_CODE_DTYPES: dict[Encoding, torch.dtype] = {"int8": torch.int8, "int4": torch.uint8}


@dataclass(frozen=True)
class Envelope:
    """The identity of a message's KV; decode refuses a message with another envelope.

    A message holds all KV of a prompt, or one part of it (:mod:`rayapp.kv.parts`): ``part`` is its
    number, and ``is_last`` says that no other part follows.
    """

    request_id: str
    attempt: int
    plan_fingerprint: str
    weights_fingerprint: str
    part: int = 0
    is_last: bool = True


@dataclass(frozen=True)
class MessageSizes:
    """Bytes of a message: ``payload_bytes`` are keys, values and scales; the rest is overhead."""

    payload_bytes: int = 0
    overhead_bytes: int = 0

    def __add__(self, other: MessageSizes) -> MessageSizes:
        return MessageSizes(
            self.payload_bytes + other.payload_bytes, self.overhead_bytes + other.overhead_bytes
        )

    @property
    def total_bytes(self) -> int:
        """Number of bytes of the whole message."""
        return self.payload_bytes + self.overhead_bytes


def pack(segment: KVSegment, envelope: Envelope) -> Message:
    """Make a message of ``segment``; its pieces are views of the segment where they can be.

    Nobody may write to the segment while the message exists. KV on another device is copied once.

    Raises:
        IntegrityError: The blocks disagree on type or shape, or the positions on the entries.
        TransferError: Numbers cannot be sent in the plan's encoding.
    """
    header, buffers = _describe(segment, envelope)
    text = header.dump()
    if len(text) > MAX_HEADER_BYTES:
        raise IntegrityError(
            f"a header of {len(text)} bytes exceeds {MAX_HEADER_BYTES}; positions are too scattered"
        )
    head = np.zeros(PREFIX_BYTES + aligned(len(text)), dtype=np.uint8)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(text), len(head) + header.body_bytes)
    head[: len(prefix)] = np.frombuffer(prefix, np.uint8)
    head[PREFIX_BYTES : PREFIX_BYTES + len(text)] = np.frombuffer(text, np.uint8)
    pieces = [head]
    for tensor in (tensor for tensors in buffers for tensor in tensors):
        pieces += pieces_of(tensor)
        padding = aligned(tensor.nbytes) - tensor.nbytes
        if padding:
            pieces.append(np.zeros(padding, dtype=np.uint8))
    checksum = _CHECKSUM.pack(digest_of(pieces).intdigest())
    head[_CHECKSUM_AT : _CHECKSUM_AT + len(checksum)] = np.frombuffer(checksum, np.uint8)
    return Message(tuple(pieces))


def unpack(message: Message | Bytes, expected: Envelope) -> KVSegment:
    """Return the segment inside ``message``, on the CPU.

    **The segment is read-only.** Blocks in the model's own type are views of ``message``, which may
    be shared memory of an object store: writing through them would change it for every reader, and
    torch cannot forbid it. Copy them into memory of your own, or call
    :func:`rayapp.kv.landing.land` instead. Quantised blocks are decoded into fresh tensors.

    Args:
        message: The message, or all its bytes in one row.
        expected: The envelope that it must have.

    Raises:
        WireError: The message is damaged or malformed, or its envelope is not ``expected``.
    """
    message = _as_message(message)
    header_bytes = _check_prefix(message)
    check_digest(message, digest_of(message.pieces))
    header, body_at = _read_header(message, header_bytes)
    _check_envelope(header, expected)
    return segment_of(header, [_views(header, e, message, body_at) for e in header.blocks])


def extent_of(message: Arrival, expected: Envelope) -> KVExtent:
    """Read the lengths of a message's prompt from its header.

    Raises:
        WireError: The header is malformed, or its envelope is not ``expected``. Damage of other
            kinds is not noticed.
    """
    return _extent(read_head(message, expected)[0])


def read_head(message: Arrival, expected: Envelope) -> tuple[Header, int]:
    """Return a message's header, and the offset at which its buffers begin.

    Raises:
        WireError: The header is malformed, or its envelope is not ``expected``.
    """
    if isinstance(message, Message):
        message.check_pieces()
    header, body_at = _read_header(message, _check_prefix(message))
    _check_envelope(header, expected)
    return header, body_at


def message_sizes(message: Arrival | Bytes) -> MessageSizes:
    """Read the sizes of ``message`` from its header; ``total_bytes`` equals ``message.nbytes``."""
    if isinstance(message, np.ndarray):
        message = _as_message(message)
    payload_bytes = _read_header(message, _check_prefix(message))[0].payload_bytes
    return MessageSizes(payload_bytes, message.nbytes - payload_bytes)


def _as_message(message: Message | Bytes) -> Message:
    """The message of some pieces; :class:`WireError` if they are not rows of bytes."""
    found = message if isinstance(message, Message) else Message((message,))
    found.check_pieces()
    return found


def _describe(
    segment: KVSegment, envelope: Envelope
) -> tuple[Header, list[tuple[torch.Tensor, ...]]]:
    """The header of a segment, and its buffers in the order in which they travel."""
    dtype, heads, dim = _common_shape(segment)
    sizes = [
        buffer_sizes(entry.encoding, heads, entry.num_entries, dim, dtype.itemsize)
        for entry in segment.blocks
    ]
    offsets, _ = layout(sizes)
    try:
        header = Header(
            **asdict(envelope),
            num_prompt_tokens=segment.num_prompt_tokens,
            num_prefilled=segment.num_prefilled,
            num_visual_tokens_removed=segment.num_visual_tokens_removed,
            is_compact=segment.is_compact,
            dtype=DTYPE_NAMES[dtype],
            num_kv_heads=heads,
            head_dim=dim,
            blocks=tuple(map(_describe_block, segment.blocks, offsets)),
        )
    except ValidationError as error:
        raise IntegrityError(f"a segment breaks a rule of the wire format: {error}") from None
    return header, [encode(e.keys_HND, e.values_HND, e.encoding) for e in segment.blocks]


def _describe_block(entry: BlockKV, offsets: tuple[int, ...]) -> BlockHeader:
    return BlockHeader(
        block=entry.block,
        encoding=entry.encoding,
        num_entries=entry.num_entries,
        runs=runs_of(entry.positions_N),
        offsets=offsets,
    )


def _common_shape(segment: KVSegment) -> tuple[torch.dtype, int, int]:
    """Type, KV heads and head dimension of all blocks; nominal values if there is no block."""
    shapes = {
        (tensor.dtype, tensor.shape[0], tensor.shape[2])
        for entry in segment.blocks
        for tensor in (entry.keys_HND, entry.values_HND)
    }
    if not shapes:
        return torch.float32, 1, 1
    if len(shapes) > 1 or next(iter(shapes))[0] not in DTYPE_NAMES:
        raise IntegrityError(
            f"keys and values are {sorted(map(str, shapes))}; one message holds one shape, "
            f"of type {', '.join(DTYPES)}"
        )
    for entry in segment.blocks:
        if not entry.keys_HND.shape[1] == entry.values_HND.shape[1] == entry.num_entries:
            raise IntegrityError(
                f"block {entry.block}: {entry.keys_HND.shape[1]} keys, {entry.values_HND.shape[1]} "
                f"values and {entry.num_entries} positions; they must be equally many"
            )
    return shapes.pop()


def digest_of(pieces: Sequence[Bytes]) -> xxhash.xxh3_64:
    """XXH3-64 of everything but the checksum itself, which is in the first piece."""
    digest = xxhash.xxh3_64(pieces[0].data[:_CHECKSUM_AT])
    digest.update(pieces[0].data[_CHECKSUM_AT + _CHECKSUM.size :])
    for piece in pieces[1:]:
        digest.update(piece.data)
    return digest


def check_digest(message: Arrival, digest: xxhash.xxh3_64) -> None:
    """Raise :class:`WireError` unless a message was packed with this checksum."""
    stored = int(_CHECKSUM.unpack_from(message.head.data, _CHECKSUM_AT)[0])
    actual = digest.intdigest()
    if stored != actual:
        raise WireError(
            f"the KV message's checksum is {actual:#018x}, it was packed with {stored:#018x}; "
            f"it is damaged: prefill again"
        )


def _check_prefix(message: Arrival) -> int:
    """Check a message's prefix against its real size; return the number of bytes of its header."""
    head = message.head
    if head.nbytes < PREFIX_BYTES:
        raise WireError(
            f"a KV message has at least {PREFIX_BYTES} bytes, got {head.nbytes}; prefill again"
        )
    magic, version, header_bytes, message_bytes = _PREFIX.unpack_from(head.data)
    if magic != MAGIC or version != VERSION:
        raise WireError(
            f"the message begins with {magic!r} version {version}, not {MAGIC!r} version "
            f"{VERSION}; run the same release of rayapp on both stages"
        )
    if (
        header_bytes > MAX_HEADER_BYTES
        or message_bytes != message.nbytes
        or PREFIX_BYTES + aligned(header_bytes) > head.nbytes
    ):
        raise WireError(
            f"the message declares {message_bytes} bytes, {header_bytes} of header; it has "
            f"{message.nbytes}: it is damaged, prefill again"
        )
    return int(header_bytes)


def _read_header(message: Arrival, header_bytes: int) -> tuple[Header, int]:
    """Return the validated header, and the offset at which the buffers begin."""
    body_at = PREFIX_BYTES + aligned(header_bytes)
    text = message.head[PREFIX_BYTES : PREFIX_BYTES + header_bytes]
    header = Header.parse(text.tobytes())
    if body_at + header.body_bytes != message.nbytes:
        raise WireError(
            f"the header describes {body_at + header.body_bytes} bytes, the message has "
            f"{message.nbytes}; prefill again"
        )
    return header, body_at


def _check_envelope(header: Header, expected: Envelope) -> None:
    for field in fields(Envelope):
        actual, wanted = getattr(header, field.name), getattr(expected, field.name)
        if actual != wanted:
            raise WireError(
                f"the KV message has {field.name} {actual!r}, expected {wanted!r}; "
                f"it belongs elsewhere and was not used: prefill again"
            )


def _extent(header: Header) -> KVExtent:
    return KVExtent(
        header.num_prompt_tokens,
        header.num_prefilled,
        header.num_visual_tokens_removed,
        header.is_compact,
    )


def segment_of(header: Header, buffers: Sequence[tuple[torch.Tensor, ...]]) -> KVSegment:
    """The segment that a header describes, from the buffers of all blocks."""
    blocks = (_block(header, *entry) for entry in zip(header.blocks, buffers, strict=True))
    return _extent(header).segment(blocks)


def _block(header: Header, entry: BlockHeader, buffers: tuple[torch.Tensor, ...]) -> BlockKV:
    shape = (header.num_kv_heads, entry.num_entries, header.head_dim)
    keys_HND, values_HND = decode(buffers, entry.encoding, shape, DTYPES[header.dtype])
    return BlockKV(entry.block, keys_HND, values_HND, positions_of(entry.runs), entry.encoding)


def types_of(header: Header, entry: BlockHeader) -> tuple[torch.dtype, ...]:
    """Element types of a block's buffers."""
    if entry.encoding == "model":
        return (DTYPES[header.dtype],) * 2
    return (_CODE_DTYPES[entry.encoding], SCALE_DTYPE) * 2


def _views(
    header: Header, entry: BlockHeader, message: Message, body_at: int
) -> tuple[torch.Tensor, ...]:
    """The buffers of a block, as views of a message."""
    types = types_of(header, entry)
    return tuple(
        _typed(message.rows(body_at + offset, size), buffer_type)
        for offset, size, buffer_type in zip(entry.offsets, header.sizes(entry), types, strict=True)
    )


def _typed(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of bytes as numbers, ``(pieces, numbers)``, or ``(numbers,)`` if there is one piece."""
    if not rows.numel():
        return torch.empty(0, dtype=dtype)
    if rows.shape[1] % dtype.itemsize:
        raise WireError(
            f"the KV message is cut within a number of {dtype.itemsize} bytes; prefill again"
        )
    numbers = rows.view(dtype)
    return numbers[0] if len(numbers) == 1 else numbers
