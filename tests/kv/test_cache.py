"""Caches against the dense model and against masks written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicSlidingWindowLayer

from rayapp.errors import IntegrityError
from rayapp.kv.cache import CaptureCache, Prefix, PrefixCache, held_entries
from rayapp.kv.select import select_prefix
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan


@pytest.mark.parametrize("window", [2, 3, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 20])
def test_windowed_blocks_hold_what_transformers_holds(window: int, num_tokens: int) -> None:
    keys, values = torch.randn(2, 1, 2, num_tokens, 4)
    theirs = DynamicSlidingWindowLayer(sliding_window=window)
    theirs.update(keys, values)
    cache = CaptureCache([window], num_kv_heads=2, head_dim=4, dtype=torch.float32)
    seen = cache.update(keys, values, 0)
    assert seen[0] is keys  # attention over the prompt itself sees all of it
    assert torch.equal(cache.entries(0)[0], theirs.keys)
    assert torch.equal(cache.entries(0)[1], theirs.values)
    assert cache.num_entries(0) == held_entries(num_tokens, window)


def test_a_window_does_not_keep_the_whole_prompt_alive(capture) -> None:  # type: ignore[no-untyped-def]
    cache = capture([4], 100)
    assert cache.entries(0)[0].untyped_storage().nbytes() == 2 * 3 * 4 * 4
    assert cache.nbytes == 2 * 2 * 3 * 4 * 4


def test_an_empty_cache_has_empty_entries_but_a_gap_is_a_bug(capture) -> None:  # type: ignore[no-untyped-def]
    cache = capture([None, 4], 0)
    assert [tuple(cache.entries(b)[0].shape) for b in range(2)] == [(1, 2, 0, 4)] * 2
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    with pytest.raises(IntegrityError, match="block 1 wrote no KV"):
        cache.entries(1)


def test_a_fork_shares_earlier_blocks_and_diverges_later(capture) -> None:  # type: ignore[no-untyped-def]
    cache = capture([None] * 3, 5)
    forked = cache.fork(before=1)
    assert forked.blocks == (0,)
    assert forked.entries(0)[0] is cache.entries(0)[0]
    forked.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 1)
    assert cache.entries(1)[0].abs().sum() > 0
    assert cache.fork().blocks == (0, 1, 2)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_masks_equal_a_loop_over_every_pair(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    num_tokens, num_new = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    windows = tuple(data.draw(st.none() | st.integers(1, 8)) for _ in range(3))
    new = torch.arange(num_tokens, num_tokens + num_new)
    prefixes = {}
    for block in range(3):
        size = data.draw(st.integers(0, num_tokens))
        choose = st.lists(st.integers(0, num_tokens - 1), min_size=size, max_size=size, unique=True)
        rows = [sorted(data.draw(choose)) for _ in range(batch)]
        empty = torch.zeros(batch, 1, size, 2)
        positions = torch.tensor(rows, dtype=torch.int64).reshape(batch, size)
        prefixes[block] = Prefix(empty, empty, positions[0] if batch == 1 else positions)
    masks = PrefixCache(prefixes, windows).masks(new)
    for block, prefix in prefixes.items():
        rows = prefix.positions.reshape(batch, -1).tolist()
        assert masks[block].shape == (batch, 1, num_new, prefix.num_entries + num_new)
        for b, c in torch.cartesian_prod(torch.arange(batch), torch.arange(num_new)).tolist():
            query, window = num_tokens + c, windows[block]
            expected = [
                key <= query and (window is None or key > query - window)
                for key in [*rows[b], *new.tolist()]
            ]
            assert masks[block][b, 0, c].tolist() == expected


def test_equal_masks_are_one_tensor(capture) -> None:  # type: ignore[no-untyped-def]
    cache = select_prefix(PruningPlan(), capture([None, 4, None, 4], 9), torch.arange(9))
    masks = cache.masks(torch.arange(9, 12))
    assert masks[0] is masks[2]
    assert masks[1] is masks[3]
    assert masks[0].shape != masks[1].shape


def test_new_entries_are_returned_and_not_kept(capture) -> None:  # type: ignore[no-untyped-def]
    source = capture([None, 4], 6, batch=2)
    cache = select_prefix(PruningPlan(), source, torch.arange(6))
    new_keys, new_values = torch.randn(2, 2, 2, 3, 4)
    for _ in range(2):
        keys, values = cache.update(new_keys, new_values, 1)
        assert torch.equal(keys, torch.cat([source.entries(1)[0], new_keys], 2))
        assert torch.equal(values, torch.cat([source.entries(1)[1], new_values], 2))
    with pytest.raises(IntegrityError, match="block 7 attends"):
        cache.update(new_keys, new_values, 7)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.inference_mode()
def test_a_continuation_equals_the_dense_model(tiny_model, family: str) -> None:  # type: ignore[no-untyped-def]
    """Capture, hand over, continue in one call: the logits of one dense forward pass."""
    model = tiny_model(family)
    tokens = torch.randint(0, 250, (2, 27), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits[:, 19:]
    stack, plan = BlockStack(model, PruningPlan(), "prefill"), PruningPlan()
    captured = CaptureCache.for_stack(stack)
    stack.run(stack.embed(tokens[:, :19]), torch.arange(19)[None], captured)
    prefix = select_prefix(plan, captured, torch.arange(19))
    positions = torch.arange(19, 27)
    hidden = stack.run(
        stack.embed(tokens[:, 19:]), positions[None], prefix, prefix.masks(positions)
    )
    torch.testing.assert_close(stack.logits(hidden), expected, atol=1e-4, rtol=0)
