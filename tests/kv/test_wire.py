"""Wire format: bit-exact both ways, and refused whenever anything is not as packed."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import warnings

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.errors import IntegrityError, TransferError, WireError
from rayapp.kv import wire
from rayapp.kv.pieces import Bytes, Message
from rayapp.kv.quantize import buffer_sizes, round_trip
from rayapp.kv.segment import BlockKV, KVSegment
from rayapp.kv.wire import PREFIX_BYTES, Envelope, message_sizes, unpack

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def pack(segment: KVSegment, envelope: Envelope) -> Bytes:
    """All bytes of a message in one row, which can be damaged."""
    return wire.pack(segment, envelope).flat()


def forge(message: Bytes, change) -> Bytes:  # type: ignore[no-untyped-def]
    """``message`` with its header rewritten by ``change``, sizes and checksum made right again."""
    (header_bytes,) = struct.unpack_from("<I", message, 12)
    header = json.loads(bytes(message[PREFIX_BYTES : PREFIX_BYTES + header_bytes]))
    body = bytes(message[PREFIX_BYTES + -(-header_bytes // 64) * 64 :])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(text or header).encode()
    padded = text + bytes(-len(text) % 64)
    total = PREFIX_BYTES + len(padded) + len(body)
    prefix = bytearray(PREFIX_BYTES)
    struct.pack_into("<8sIIQ", prefix, 0, b"RAYAPPKV", 3, len(text), total)
    digest = xxhash.xxh3_64_intdigest(bytes(prefix[:56]) + padded + body)
    struct.pack_into("<Q", prefix, 56, digest)
    return np.frombuffer(bytes(prefix) + padded + body, np.uint8)


@st.composite
def raw_segments(draw: st.DrawFn) -> KVSegment:
    """Segments of arbitrary bit patterns, NaNs included, with scattered positions."""
    dtype = draw(st.sampled_from(list(BITS)))
    heads, dim, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    blocks = []
    for block in sorted(draw(st.sets(st.integers(0, 60), max_size=4))):
        kept = sorted(draw(st.sets(st.integers(0, tokens - 1))))
        limit = torch.iinfo(BITS[dtype])
        keys, values = (
            torch.randint(
                limit.min, limit.max, (heads, len(kept), dim), dtype=BITS[dtype],
                generator=generator,
            ).view(dtype)
            for _ in range(2)
        )  # fmt: skip
        blocks.append(BlockKV(block, keys, values, torch.tensor(kept, dtype=torch.int64)))
    return KVSegment(tuple(blocks), tokens, tokens)


@settings(max_examples=80, deadline=None)
@given(raw_segments())
def test_round_trip_is_bit_exact(sent: KVSegment) -> None:
    envelope = Envelope("r", 0, "p", "w")
    message = pack(sent, envelope)
    received = unpack(message, envelope)
    assert (received.num_prompt_tokens, received.num_prefilled) == (
        sent.num_prompt_tokens,
        sent.num_prefilled,
    )
    assert [e.block for e in received.blocks] == [e.block for e in sent.blocks]
    for ours, theirs in zip(sent.blocks, received.blocks, strict=True):
        bits = BITS[ours.keys_HND.dtype]
        assert theirs.keys_HND.dtype == ours.keys_HND.dtype
        assert torch.equal(ours.keys_HND.view(bits), theirs.keys_HND.view(bits))
        assert torch.equal(ours.values_HND.view(bits), theirs.values_HND.view(bits))
        assert torch.equal(ours.positions_N, theirs.positions_N)
    sizes = message_sizes(message)
    assert sizes.payload_bytes == sent.nbytes
    assert sizes.payload_bytes + sizes.overhead_bytes == message.nbytes == sizes.total_bytes


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_quantised_blocks_arrive_as_round_trip_says(dtype: torch.dtype, encoding: str) -> None:
    envelope = Envelope("r", 0, "p", "w")
    keys, values = torch.randn(2, 3, 7, 5).to(dtype)
    entry = BlockKV(1, keys, values, torch.arange(7), encoding)  # type: ignore[arg-type]
    message = pack(KVSegment((entry,), 7, 7), envelope)
    (received,) = unpack(message, envelope).blocks
    expected = round_trip(keys, values, encoding)  # type: ignore[arg-type]
    assert received.encoding == encoding
    assert torch.equal(received.keys_HND, expected[0])
    assert torch.equal(received.values_HND, expected[1])
    sizes = buffer_sizes(encoding, 3, 7, 5, dtype.itemsize)  # type: ignore[arg-type]
    assert message_sizes(message).payload_bytes == sum(sizes)


def test_strided_tensors_are_packed_in_order(envelope: Envelope) -> None:
    keys, values = (torch.randn(6, 2, 4).transpose(0, 1) for _ in range(2))
    message = pack(KVSegment((BlockKV(0, keys, values, torch.arange(6)),), 6, 6), envelope)
    (received,) = unpack(message, envelope).blocks
    assert torch.equal(received.keys_HND, keys)
    assert torch.equal(received.values_HND, values)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("dim", [5, 64])
def test_pieces_are_views_on_both_sides(envelope: Envelope, dtype: torch.dtype, dim: int) -> None:
    """Heads that lie apart in a prompt's memory travel without being copied together."""
    keys_HTD, values_HTD = torch.randn(2, 3, 40, dim).to(dtype)
    part = slice(8, 24)
    entry = BlockKV(0, keys_HTD[:, part], values_HTD[:, part], torch.arange(8, 24))
    message = wire.pack(KVSegment((entry,), 40, 40), envelope)
    sent = [piece.__array_interface__["data"][0] for piece in message.pieces]
    assert {t[h, 8].data_ptr() for t in (keys_HTD, values_HTD) for h in range(3)} <= {*sent}
    (received,) = unpack(message, envelope).blocks
    assert received.keys_HND.data_ptr() == keys_HTD[0, 8].data_ptr()
    stored = pickle.loads(pickle.dumps(message))
    for copied in (message.owned(), stored, Message(tuple(map(np.array, message.pieces)))):
        (received,) = unpack(copied, envelope).blocks
        assert torch.equal(received.keys_HND, keys_HTD[:, part])
        assert torch.equal(received.values_HND, values_HTD[:, part])
    assert np.array_equal(message.flat(), pack(KVSegment((entry,), 40, 40), envelope))


def test_a_message_that_is_cut_elsewhere_is_refused(segment: KVSegment, envelope: Envelope) -> None:
    flat = pack(segment, envelope)
    body_at = wire.pack(segment, envelope).pieces[0].nbytes
    for cut in (10, PREFIX_BYTES, body_at + 3, body_at + 50):
        with pytest.raises(WireError, match=r"declares|at least|unequal|within a number"):
            unpack(Message((flat[:cut], flat[cut:])), envelope)
    for wrong in (Message(()), Message((flat, "text"))):  # type: ignore[arg-type]
        with pytest.raises(WireError, match="rows of bytes"):
            unpack(wrong, envelope)


def test_empty_segments_travel(envelope: Envelope) -> None:
    empty = torch.empty(2, 0, 4, dtype=torch.bfloat16)
    entry = BlockKV(3, empty, empty, torch.empty(0, dtype=torch.int64), "int8")
    for blocks in ((), (entry,)):
        message = pack(KVSegment(blocks, 1, 0), envelope)
        assert message_sizes(message).payload_bytes == 0
        received = unpack(message, envelope)
        assert [e.num_entries for e in received.blocks] == [0] * len(blocks)
        assert received.num_prefilled == 0
    assert received.blocks[0].keys_HND.shape == (2, 0, 4)
    assert received.blocks[0].keys_HND.dtype == torch.bfloat16


def test_views_are_aligned_zero_copy_and_silent(segment: KVSegment, envelope: Envelope) -> None:
    message = pack(segment, envelope)
    message.flags.writeable = False  # as an object store hands it out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry = unpack(message, envelope).blocks[0]
    begin = message.__array_interface__["data"][0]
    for tensor in (entry.keys_HND, entry.values_HND):
        assert begin <= tensor.data_ptr() < begin + message.nbytes
        assert (tensor.data_ptr() - begin) % 64 == 0
    assert not message.flags.writeable


def test_views_keep_the_message_alive(segment: KVSegment, envelope: Envelope) -> None:
    entry = unpack(pack(segment, envelope), envelope).blocks[0]
    _ = [np.full(1 << 12, 255, np.uint8) for _ in range(64)]
    assert torch.equal(entry.keys_HND, segment.blocks[0].keys_HND)


def test_packing_is_deterministic(segment: KVSegment, envelope: Envelope) -> None:
    dirt = np.full(1 << 16, 255, np.uint8)
    first = pack(segment, envelope)
    del dirt
    assert np.array_equal(first, pack(segment, envelope))


def test_a_flipped_bit_anywhere_is_refused(segment: KVSegment, envelope: Envelope) -> None:
    message = pack(segment, envelope)
    for bit in range(message.nbytes * 8):  # every one of them: prefix, header, padding, payload
        message[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpack(message, envelope)
        message[bit // 8] ^= 1 << bit % 8
    unpack(message, envelope)


def test_truncated_extended_and_garbage_are_refused(segment: KVSegment, envelope: Envelope) -> None:
    message = pack(segment, envelope)
    damaged = [message[:n] for n in (0, 1, 63, 64, 100, message.nbytes - 64, message.nbytes - 1)]
    damaged.append(np.concatenate([message, np.zeros(64, np.uint8)]))
    damaged.append(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))
    damaged.append(message.astype(np.int16))
    damaged.append(message.reshape(-1, 64))
    damaged.append(np.repeat(message, 2)[::2])
    damaged.append(bytes(message))  # type: ignore[arg-type]
    for wrong in damaged:
        with pytest.raises(WireError):
            unpack(wrong, envelope)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_headers_are_refused(text: bytes) -> None:
    envelope = Envelope("r", 0, "p", "w")
    message = pack(KVSegment((), 3, 3), envelope)
    with pytest.raises(WireError):
        unpack(forge(message, lambda _: text), envelope)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("request_id", "request-8"),
        ("attempt", 2),
        ("plan_fingerprint", "plan-b"),
        ("weights_fingerprint", "weights-b"),
        ("part", 3),
        ("is_last", False),
    ],
)
def test_another_envelope_is_refused_with_both_values(
    segment: KVSegment, envelope: Envelope, field: str, wrong: str | int
) -> None:
    message = pack(segment, envelope)
    expected = dataclasses.replace(envelope, **{field: wrong})
    with pytest.raises(WireError) as refusal:
        unpack(message, expected)
    assert field in str(refusal.value)
    assert repr(wrong) in str(refusal.value)
    assert repr(getattr(envelope, field)) in str(refusal.value)


HOSTILE = {
    "unknown key": lambda h: {**h, "pickle": "gASV"},
    "huge block": lambda h: h["blocks"][0].update(num_entries=2**24, runs=[[0, 2**24]]),
    "impossible count": lambda h: h["blocks"][0].update(num_entries=2**70),
    "count without runs": lambda h: h["blocks"][0].update(num_entries=4),
    "negative run": lambda h: h["blocks"][0].update(runs=[[-1, 3]]),
    "overlapping runs": lambda h: h["blocks"][0].update(runs=[[0, 2], [1, 1]]),
    "descending runs": lambda h: h["blocks"][0].update(runs=[[5, 2], [0, 1]]),
    "position past the prompt": lambda h: h["blocks"][0].update(runs=[[0, 2], [9, 1]]),
    "offset elsewhere": lambda h: h["blocks"][0].update(offsets=[64, 128]),
    "offset far away": lambda h: h["blocks"][0].update(offsets=[0, 2**80]),
    "missing offset": lambda h: h["blocks"][0].update(offsets=[0]),
    "wide heads": lambda h: h.update(num_kv_heads=2**16),
    "no head": lambda h: h.update(num_kv_heads=0),
    "other width": lambda h: h.update(head_dim=8),
    "other type": lambda h: h.update(dtype="float64"),
    "narrower type": lambda h: h.update(dtype="bfloat16"),
    "other encoding": lambda h: h["blocks"][0].update(encoding="int8"),
    "unknown encoding": lambda h: h["blocks"][0].update(encoding="pickle"),
    "block twice": lambda h: h["blocks"].append(h["blocks"][0]),
    "block missing": lambda h: h["blocks"].pop(),
    "prefilled more than the prompt": lambda h: h.update(num_prefilled=10),
    "prefilled too little": lambda h: h.update(num_prefilled=7),
    "text for a number": lambda h: h.update(attempt="1"),
    "number for a text": lambda h: h.update(request_id=7),
    "long name": lambda h: h.update(request_id="r" * 300),
    "not an object": lambda h: [h],
    "deep": lambda h: b"[" * 100_000,
    "not UTF-8": lambda h: b'{"request_id": "\xff"}',
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(  # type: ignore[no-untyped-def]
    segment: KVSegment, envelope: Envelope, change
) -> None:
    """Checksum and sizes are right: only the rules of the header stand in the way."""
    message = pack(segment, envelope)
    unpack(forge(message, lambda header: header), envelope)
    with pytest.raises(WireError, match="header"):
        unpack(forge(message, change), envelope)


def test_a_consistent_header_larger_than_its_message_is_refused(envelope: Envelope) -> None:
    """Every rule inside the header holds; it describes 2 GiB that the message does not have."""
    keys = torch.zeros(1, 4, 16)
    message = pack(KVSegment((BlockKV(0, keys, keys, torch.arange(4)),), 4, 4), envelope)
    entries = 2**24
    block = {"num_entries": entries, "runs": [[0, entries]], "offsets": [0, entries * 64]}

    def grow(header):  # type: ignore[no-untyped-def]
        header["blocks"][0].update(block)
        header.update(num_prompt_tokens=entries, num_prefilled=entries)

    with pytest.raises(WireError, match="header describes 2147"):
        unpack(forge(message, grow), envelope)
    with pytest.raises(WireError, match="header describes 2147"):
        message_sizes(forge(message, grow))


@pytest.mark.parametrize("version", [1, 2])
def test_a_message_of_an_earlier_format_is_refused_by_its_version(
    segment: KVSegment, envelope: Envelope, version: int
) -> None:
    """The first may hold one scale per channel and message, and would give other numbers."""
    message = pack(segment, envelope)
    struct.pack_into("<I", message, 8, version)
    with pytest.raises(WireError, match=rf"version {version}, not .* version 3; run the same"):
        unpack(message, envelope)


def test_a_cut_message_is_refused_with_both_sizes(segment: KVSegment, envelope: Envelope) -> None:
    message = pack(segment, envelope)
    with pytest.raises(WireError, match=f"declares {message.nbytes} bytes.*{message.nbytes - 64}"):
        unpack(message[:-64], envelope)


def test_our_own_mistakes_are_not_packed(envelope: Envelope) -> None:
    keys, values, positions = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.arange(3)
    mistakes = [
        [BlockKV(0, keys, values[:, :2], positions)],
        [BlockKV(0, keys, values, positions[:2])],
        [BlockKV(0, keys, values, positions.flip(0))],
        [BlockKV(0, keys, values, positions + 1)],
        [BlockKV(0, keys, values.half(), positions)],
        [BlockKV(0, keys.double(), values.double(), positions)],
        [BlockKV(1, keys, values, positions), BlockKV(0, keys, values, positions)],
        [BlockKV(0, keys, values, positions), BlockKV(1, keys[:1], values[:1], positions)],
    ]
    for blocks in mistakes:
        with pytest.raises(IntegrityError):
            pack(KVSegment(tuple(blocks), 3, 3), envelope)


def test_numbers_that_cannot_be_quantised_are_not_packed(envelope: Envelope) -> None:
    for bad in (float("nan"), float("inf"), 1e8):
        keys = torch.full((1, 2, 4), bad)
        entry = BlockKV(0, torch.ones(1, 2, 4), keys, torch.arange(2), "int8")
        with pytest.raises(TransferError, match="encoding model"):
            pack(KVSegment((entry,), 2, 2), envelope)
