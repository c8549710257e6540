"""A segment that is sent in parts equals the segment sent whole, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.errors import IntegrityError
from rayapp.kv.ledger import KVShape, Route, account
from rayapp.kv.parts import joined, part
from rayapp.kv.quantize import decode, encode, round_trip
from rayapp.kv.segment import BlockKV, KVSegment
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


@settings(max_examples=60, deadline=None)
@given(
    rules=st.lists(some_rules(), min_size=3, max_size=3),
    num_tokens=st.sampled_from([1, 2, KEY_GROUP, 131, 260]),
    dtype=st.sampled_from(DTYPES),
    windows=st.sampled_from([(None, None, None), (None, KEY_GROUP + 9, 20)]),
    cuts=st.sets(st.integers(1, 5)),
)
def test_parts_joined_equal_the_whole(capture, rules, num_tokens, dtype, windows, cuts) -> None:  # type: ignore[no-untyped-def]
    """For any cut between groups, any rule, and blocks that keep different numbers of entries."""
    cache = capture(windows, num_tokens, dim=3, dtype=dtype, seed=num_tokens)
    plan = plan_of(dict(enumerate(rules)), 3)
    segment = select_segment(plan, cache, torch.arange(num_tokens), num_tokens)
    whole = unpack(pack(segment, SENT), SENT)
    borders = [0, *(KEY_GROUP * cut for cut in sorted(cuts)), None]
    messages = [
        pack(part(segment, begin or 0, end), SENT) for begin, end in itertools.pairwise(borders)
    ]
    assert_equal(joined([unpack(message, SENT) for message in messages]), whole)
    payloads = [message_sizes(message).payload_bytes for message in messages]
    sizes = message_sizes(pack(segment, SENT))
    # Sizes agree but for the half byte that pads an odd number of int4 codes.
    assert 0 <= sum(payloads) - sizes.payload_bytes <= 2 * 3 * len(payloads)
    shape = KVShape(3, 2, 3, dtype.itemsize, windows)
    record = account(shape, plan, sizes, Route("r", 0, "a", "b"), num_prompt_tokens=num_tokens)
    assert record.saved_by_encoding_bytes == segment.nbytes - sizes.payload_bytes


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


@pytest.mark.parametrize("borders", [(1, None), (0, KEY_GROUP - 1), (-KEY_GROUP, 0), (128, 64)])
def test_a_cut_inside_a_group_is_refused(segment, borders) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(IntegrityError, match=f"multiples of {KEY_GROUP}"):
        part(segment, *borders)


def test_parts_that_do_not_belong_together_are_not_joined(segment) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(IntegrityError, match="at least one part"):
        joined([])
    with pytest.raises(IntegrityError, match="different segments"):
        joined([segment, dataclasses.replace(segment, num_prompt_tokens=99)])
    with pytest.raises(IntegrityError, match="different segments"):
        joined([segment, dataclasses.replace(segment, blocks=segment.blocks[:1])])
    with pytest.raises(IntegrityError, match="do not ascend"):
        joined([segment, segment])


def test_a_part_is_a_view(segment) -> None:  # type: ignore[no-untyped-def]
    cut: BlockKV = part(segment, 0, KEY_GROUP).blocks[0]
    assert cut.keys_HND.data_ptr() == segment.blocks[0].keys_HND.data_ptr()
