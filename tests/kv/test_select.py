"""Selection against naive loops over blocks and entries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.errors import IntegrityError
from rayapp.kv.quantize import round_trip
from rayapp.kv.select import (
    kept_entries,
    num_prefilled,
    select_prefix,
    select_segment,
    sent_blocks,
)
from rayapp.kv.wire import Envelope, pack, unpack
from rayapp.plan import KVTransfer, ModelSignature, PruningPlan, StagePlan, resolve


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 40))
def test_kept_entries_equal_a_loop(any_rule, data: st.DataObject, num_entries: int) -> None:  # type: ignore[no-untyped-def]
    rule = data.draw(any_rule)
    kept = [
        index
        for index in range(num_entries)
        if (rule.first is None and rule.last is None)
        or index < resolve(rule.first or 0, num_entries)
        or index >= num_entries - resolve(rule.last or 0, num_entries)
    ]
    assert kept_entries(rule, num_entries).tolist() == kept


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 25), st.integers(0, 10))
def test_segments_equal_a_loop(any_plan, capture, data, num_tokens, num_removed) -> None:  # type: ignore[no-untyped-def]
    """Random plans, windows and visual tokens: whatever is kept is what the block wrote there."""
    plan = data.draw(any_plan)
    windows = tuple(data.draw(st.none() | st.integers(1, 12)) for _ in range(5))
    run = num_prefilled(plan, num_tokens)
    gone = data.draw(st.sets(st.integers(0, max(run - 1, 0)), max_size=min(num_removed, run)))
    positions = [p for p in range(run) if p not in gone]
    cache = capture(windows, len(positions))
    segment = select_segment(plan, cache, torch.tensor(positions, dtype=torch.int64), num_tokens)

    assert (segment.num_prompt_tokens, segment.num_prefilled) == (num_tokens, run)
    assert [e.block for e in segment.blocks] == [
        b for b in range(5) if plan.mode("decode", b).attends
    ]
    for entry in segment.blocks:
        window = windows[entry.block]
        held = positions if window is None else positions[max(len(positions) - window + 1, 0) :]
        kept = kept_entries(plan.transfer(entry.block), len(held)).tolist()
        keys, values = cache.entries(entry.block)
        assert entry.positions_N.tolist() == [held[i] for i in kept]
        assert entry.encoding == plan.transfer(entry.block).encoding
        for place, index in enumerate(kept):
            assert torch.equal(entry.keys_HND[:, place], keys[0, :, index])
            assert torch.equal(entry.values_HND[:, place], values[0, :, index])


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_prefix_is_what_arrives_over_the_wire(any_plan, capture, data, num_tokens, dtype) -> None:  # type: ignore[no-untyped-def]
    """Scoring (batched, no bytes) and serving (one by one, over the wire) see the same KV."""
    plan, windows, envelope = data.draw(any_plan), (None, 4, None, 9, 4), Envelope("r", 0, "p", "w")
    run = num_prefilled(plan, num_tokens)
    positions = torch.arange(run)
    batch = capture(windows, run, batch=3 if run else 1, dtype=dtype)
    prefix = select_prefix(plan, batch, positions)
    for row in range(3 if run else 1):
        alone = capture(windows, 0, dtype=dtype)
        for block in batch.blocks:
            keys, values = batch.entries(block)
            alone._entries[block] = (keys[row : row + 1], values[row : row + 1])
        message = pack(select_segment(plan, alone, positions, num_tokens), envelope)
        arrived = unpack(message, envelope)
        assert tuple(e.block for e in arrived.blocks) == tuple(prefix.prefixes)
        for entry in arrived.blocks:
            ours = prefix.prefixes[entry.block]
            assert torch.equal(entry.keys_HND, ours.keys_BHND[row])
            assert torch.equal(entry.values_HND, ours.values_BHND[row])
            assert torch.equal(entry.positions_N, ours.positions)


def test_one_token_under_first_token_decode_is_an_empty_segment(capture) -> None:  # type: ignore[no-untyped-def]
    plan = PruningPlan(model=_signature(3), first_token="decode")
    segment = select_segment(plan, capture([None] * 3, 0), torch.arange(0), 1)
    assert [e.num_entries for e in segment.blocks] == [0, 0, 0]
    assert (segment.num_prefilled, segment.nbytes) == (0, 0)


def test_counts_and_shares_by_hand(capture) -> None:  # type: ignore[no-untyped-def]
    """Ten entries at 0, 2, 4, ..., 18; block 2 holds the last four of them."""
    plan = PruningPlan(
        model=_signature(4),
        decode=StagePlan(blocks={3: "removed"}),
        kv_transfer={
            0: KVTransfer(first=1, last=2),
            1: KVTransfer(first=0.21, encoding="int8"),
            2: KVTransfer(first=1, last=0.5),
        },
    )
    segment = select_segment(plan, capture([None, None, 5, None], 10), torch.arange(0, 20, 2), 20)
    assert {e.block: e.positions_N.tolist() for e in segment.blocks} == {
        0: [0, 16, 18],
        1: [0, 2, 4],
        2: [12, 16, 18],
    }
    assert sent_blocks(plan, 4) == (0, 1, 2)


def test_positions_of_another_prompt_are_refused(capture) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(IntegrityError, match="holds 9 entries"):
        select_segment(PruningPlan(), capture([None], 9), torch.arange(8), 8)
    with pytest.raises(IntegrityError, match="2 prompts"):
        select_segment(PruningPlan(), capture([None], 9, batch=2), torch.arange(9), 9)


def test_the_prefix_of_a_quantised_block_went_through_quantisation(capture) -> None:  # type: ignore[no-untyped-def]
    plan = PruningPlan(model=_signature(1), kv_transfer={0: KVTransfer(encoding="int4")})
    cache = capture([None], 6)
    ours = select_prefix(plan, cache, torch.arange(6)).prefixes[0]
    assert torch.equal(ours.keys_BHND, round_trip(*cache.entries(0), "int4")[0])
    assert not torch.equal(ours.keys_BHND, cache.entries(0)[0])


def _signature(num_blocks: int) -> ModelSignature:
    return ModelSignature(
        model_type="llama",
        num_blocks=num_blocks,
        hidden_size=8,
        num_kv_heads=2,
        head_dim=4,
        vocab_size=9,
        weights_fingerprint="weights",
    )
