"""A segment that is sent in parts equals the segment sent whole, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.errors import IntegrityError
from rayapp.kv.cache import CaptureCache, held_entries
from rayapp.kv.growing import PromptKV
from rayapp.kv.parts import PartCutter, joined, kept_ranges
from rayapp.kv.quantize import decode, encode, round_trip
from rayapp.kv.segment import KVExtent, KVSegment
from rayapp.kv.select import kept_entries, select_segment
from rayapp.kv.wire import Envelope, message_sizes, pack, unpack
from rayapp.plan import KEY_GROUP, KVTransfer, ModelSignature, PruningPlan

ENCODINGS = ("model", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (0, 1, KEY_GROUP - 1, KEY_GROUP, KEY_GROUP + 1, 3 * KEY_GROUP, 3 * KEY_GROUP + 7)
SENT = Envelope("r", 0, "p", "w")


def plan_of(rules: dict[int, KVTransfer], num_blocks: int) -> PruningPlan:
    signature = ModelSignature(
        model_type="llama", num_blocks=num_blocks, hidden_size=8, num_kv_heads=2, head_dim=3,
        vocab_size=9, weights_fingerprint="weights",
    )  # fmt: skip
    return PruningPlan(model=signature, kv_transfer=rules)


def assert_equal(found: KVSegment, wanted: KVSegment) -> None:
    assert dataclasses.replace(found, blocks=()) == dataclasses.replace(wanted, blocks=())
    for ours, theirs in zip(found.blocks, wanted.blocks, strict=True):
        assert (ours.block, ours.encoding) == (theirs.block, theirs.encoding)
        assert ours.keys_HND.dtype == theirs.keys_HND.dtype
        assert torch.equal(ours.keys_HND, theirs.keys_HND)
        assert torch.equal(ours.values_HND, theirs.values_HND)
        assert torch.equal(ours.positions_N, theirs.positions_N)


def some_rules() -> st.SearchStrategy[KVTransfer]:
    amount = st.sampled_from([None, 0, 1, 5, KEY_GROUP, 100, 0.3, 0.51, 1.0])
    kept = st.tuples(amount, amount).filter(lambda pair: pair == (None, None) or any(pair))
    return st.builds(
        lambda pair, encoding: KVTransfer(first=pair[0], last=pair[1], encoding=encoding),
        kept,
        st.sampled_from(ENCODINGS),
    )


def grown(cache: CaptureCache, num_tokens: int, most: int = 70) -> Iterator[PromptKV]:
    """The KV of a prompt as chunks of 1 to ``most`` tokens make it, yielded after every block.

    What is unknown is NaN.
    """
    kv = PromptKV(cache, torch.arange(num_tokens) * 2)
    while kv.num_done < num_tokens:
        count = min(1 + (kv.num_done * 7) % 70, num_tokens - kv.num_done, most)
        count = num_tokens if most > num_tokens else count
        for block in range(len(cache.windows)):
            new = (t[:, :, kv.num_done : kv.num_done + count] for t in cache.whole[block])
            kv.append(block, *new)
            for tensor in kv.memory(block):
                tensor[:, :, kv.num_done + count :] = float("nan")
            assert kv.num_known(block) == kv.num_done + count
            yield kv
        kv.num_done += count


class Dense(CaptureCache):
    """A cache that also keeps what fell out of a window."""

    def __init__(self, cache: CaptureCache, num_tokens: int) -> None:
        super().__init__(
            cache.windows, num_kv_heads=cache.num_kv_heads, head_dim=cache.head_dim,
            dtype=cache.dtype,
        )  # fmt: skip
        shape = (1, cache.num_kv_heads, num_tokens, cache.head_dim)
        self.whole = {
            block: tuple(torch.randn(shape).to(cache.dtype) for _ in range(2))
            for block in range(len(cache.windows))
        }
        for block, entries in self.whole.items():
            self.update(*entries, block)


@settings(max_examples=40, deadline=None)
@given(
    rules=st.lists(some_rules(), min_size=3, max_size=3),
    num_tokens=st.sampled_from([1, 2, KEY_GROUP, 131, 260]),
    dtype=st.sampled_from(DTYPES),
    windows=st.sampled_from([(None, None, None), (None, KEY_GROUP + 9, 20)]),
    every=st.integers(1, 5),
    most=st.sampled_from([70, 1000]),
)
def test_parts_joined_equal_the_whole(  # type: ignore[no-untyped-def]
    capture, rules, num_tokens, dtype, windows, every, most
) -> None:
    """For any chunks or one, any blocks of them, any rule, and blocks that keep unlike numbers."""
    cache = Dense(capture(windows, num_tokens, dim=3, dtype=dtype), num_tokens)
    plan = plan_of(dict(enumerate(rules)), 3)
    segment = select_segment(plan, cache, torch.arange(num_tokens) * 2, num_tokens * 2)
    segment = dataclasses.replace(segment, num_prefilled=num_tokens)
    extent = KVExtent(num_tokens * 2, num_tokens, num_tokens)
    segment = extent.segment(segment.blocks)
    cutter = PartCutter(plan, cache, extent)
    messages = []
    packed_bytes = 0

    def add(part) -> None:  # type: ignore[no-untyped-def]
        nonlocal packed_bytes
        packed_bytes += part.segment().nbytes
        sent = dataclasses.replace(SENT, part=len(messages))
        messages.append(pack(part.segment(), sent))

    for number, kv in enumerate(grown(cache, num_tokens, most)):
        if number % every == 0:
            ready = cutter.num_ready_bytes(kv)
            assert cutter.cut(kv, least_bytes=ready + 1) is None
            part = cutter.cut(kv, least_bytes=max(1, ready))
            if part is not None:
                assert part.segment().nbytes == ready > 0
                add(part)
    add(cutter.rest(kv))
    assert packed_bytes == segment.nbytes == cutter.num_bytes
    assert cutter.cut(kv, least_bytes=0) is None  # Nothing follows the last part.
    received = [
        unpack(message, dataclasses.replace(SENT, part=number))
        for number, message in enumerate(messages)
    ]
    assert_equal(joined(received), unpack(pack(segment, SENT), SENT))
    payloads = [message_sizes(message).payload_bytes for message in messages]
    sizes = message_sizes(pack(segment, SENT))
    assert sum(payloads) == sizes.payload_bytes


@pytest.mark.parametrize("encoding", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_every_group_is_encoded_as_it_is_alone(count, dtype, encoding) -> None:  # type: ignore[no-untyped-def]
    keys, values = (torch.randn(2, count, 5).to(dtype) for _ in range(2))
    whole = decode(encode(keys, values, encoding), encoding, (2, count, 5), dtype)
    assert all(map(torch.equal, whole, round_trip(keys, values, encoding)))
    for begin in range(0, count, KEY_GROUP):
        rows = slice(begin, begin + KEY_GROUP)
        alone = round_trip(keys[:, rows], values[:, rows], encoding)
        assert torch.equal(whole[0][:, rows], alone[0])
        assert torch.equal(whole[1][:, rows], alone[1])


def test_groups_count_kept_entries_and_not_positions() -> None:
    """The first group of a cut block holds its first entries and, after the gap, its last ones."""
    keys, values = torch.randn(2, 1, 2 * KEY_GROUP, 4)
    keys[:, 40] = 1000.0  # dropped: no scale may know of it
    kept = kept_entries(KVTransfer(first=4, last=8), 2 * KEY_GROUP)
    found, _ = round_trip(keys[:, kept], values[:, kept], "int8")
    assert float((found - keys[:, kept]).abs().max()) < 0.02


def test_parts_that_do_not_belong_together_are_not_joined(segment) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(IntegrityError, match="at least one part"):
        joined([])
    with pytest.raises(IntegrityError, match="different segments"):
        joined([segment, dataclasses.replace(segment, num_prompt_tokens=99)])
    with pytest.raises(IntegrityError, match="different segments"):
        joined([segment, dataclasses.replace(segment, blocks=segment.blocks[:1])])
    with pytest.raises(IntegrityError, match="do not ascend"):
        joined([segment, segment])


def test_a_part_is_a_view(capture) -> None:  # type: ignore[no-untyped-def]
    cache = Dense(capture((None,), 200), 200)
    cutter = PartCutter(plan_of({}, 1), cache, KVExtent(200, 200))
    for kv in grown(cache, 200):
        if kv.num_known(0) > KEY_GROUP:
            entry = cutter.cut(kv).segment().blocks[0]
            assert entry.keys_HND.data_ptr() == kv.memory(0)[0].data_ptr()
            break


@pytest.mark.parametrize("rule", [(4, 8), (4, 0), (0, 8), (None, None), (0.5, 0.5)])
def test_ranges_of_kept_tokens_are_those_of_kept_entries(rule) -> None:  # type: ignore[no-untyped-def]
    transfer = KVTransfer(first=rule[0], last=rule[1])
    for num_tokens, window in itertools.product((0, 1, 5, 30), (None, 11)):
        held = held_entries(num_tokens, window)
        kept = kept_entries(transfer, held) + num_tokens - held
        ranges = kept_ranges(transfer, num_tokens, window)
        assert [t for begin, end in ranges for t in range(begin, end)] == kept.tolist()
