"""Quantisation keeps the bounds that its module states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.errors import TransferError
from rayapp.kv.quantize import LEVELS, MIN_SCALE, buffer_sizes, decode, encode, round_trip
from rayapp.plan import KEY_GROUP


@settings(max_examples=80, deadline=None)
@given(
    encoding=st.sampled_from(["int8", "int4"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 9) | st.just(70), st.integers(1, 7)),
    magnitude=st.sampled_from([1e-9, 1e-6, 1e-4, 1.0, 300.0]),
    seed=st.integers(0, 10_000),
)
def test_error_is_within_half_a_scale(encoding, dtype, shape, magnitude, seed) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        (torch.randn(shape, generator=generator) * magnitude).to(dtype) for _ in range(2)
    )
    buffers = encode(keys, values, encoding)
    sizes = buffer_sizes(encoding, shape[0], shape[1], shape[2], dtype.itemsize)
    assert tuple(b.nbytes for b in buffers) == sizes
    decoded = decode(buffers, encoding, shape, dtype)
    if not shape[1]:
        return
    exact = keys.double()
    groups = [group.abs().amax(1, keepdim=True) for group in exact.split(KEY_GROUP, dim=1)]
    by_group = torch.cat([g.expand(-1, KEY_GROUP, -1) for g in groups], dim=1)[:, : shape[1]]
    assert bool((by_group <= exact.abs().amax(1, keepdim=True)).all())  # as near as by prompt
    by_token = values.double().abs().amax(2, keepdim=True)
    for original, found, largest in ((keys, decoded[0], by_group), (values, decoded[1], by_token)):
        assert found.shape == shape
        assert found.dtype == dtype
        scale = (largest / LEVELS[encoding]).clamp(min=MIN_SCALE) * (1 + 2**-10)
        rounding = torch.finfo(dtype).eps * (largest + scale)
        error = (found.double() - original.double()).abs()
        assert bool((error <= scale / 2 + rounding).all())


def test_an_outlier_costs_its_own_group_only() -> None:
    """Keys of all other groups are as near as if it were not there."""
    keys, values = torch.randn(2, 1, 3 * KEY_GROUP, 4)
    loud = keys.clone()
    loud[:, KEY_GROUP] = 500.0
    found, plain = (round_trip(each, values, "int4")[0] for each in (loud, keys))
    others = [*range(KEY_GROUP), *range(2 * KEY_GROUP, 3 * KEY_GROUP)]
    assert torch.equal(found[:, others], plain[:, others])


def test_groups_do_not_share_scales() -> None:
    """An outlier channel of the keys, or token of the values, costs no other any accuracy."""
    keys, values = torch.ones(1, 4, 3), torch.ones(1, 4, 3)
    keys[0, :, 1], values[0, 2] = 1000.0, 1000.0
    found_keys, found_values = round_trip(keys, values, "int4")
    assert torch.allclose(found_keys, keys, rtol=2e-3)
    assert torch.allclose(found_values, values, rtol=2e-3)
    mixed_keys, _ = round_trip(values, keys, "int4")
    assert not torch.allclose(mixed_keys, values, rtol=0.1)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_zeros_stay_zero_and_extremes_keep_their_sign(encoding) -> None:  # type: ignore[no-untyped-def]
    keys = torch.tensor([[[0.0, -5.0], [0.0, 5.0]]])
    values = torch.tensor([[[0.0, 0.0], [-3.0, 3.0]]])
    found_keys, found_values = round_trip(keys, values, encoding)
    assert torch.equal(found_keys[..., 0], torch.zeros(1, 2))
    assert torch.equal(found_values[:, 0], torch.zeros(1, 2))
    assert torch.allclose(found_keys, keys, rtol=1e-3)
    assert torch.allclose(found_values, values, rtol=1e-3)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_round_trip_of_a_batch_is_that_of_each_prompt(encoding, batch) -> None:  # type: ignore[no-untyped-def]
    keys, values = torch.randn(2, batch, 2, 5, 3)
    found_keys, found_values = round_trip(keys, values, encoding)
    for row in range(batch):
        alone = decode(encode(keys[row], values[row], encoding), encoding, (2, 5, 3), torch.float32)
        assert torch.equal(found_keys[row], alone[0])
        assert torch.equal(found_values[row], alone[1])


def test_int4_takes_half_a_byte_per_number() -> None:
    # By hand: 2 heads x 3 entries x 5 = 30 numbers; scales: 2 x 5 for keys, 2 x 3 for values.
    assert buffer_sizes("int4", 2, 3, 5, 2) == (15, 20, 15, 12)
    assert buffer_sizes("int8", 2, 3, 5, 2) == (30, 20, 30, 12)
    assert buffer_sizes("model", 2, 3, 5, 2) == (60, 60)
    assert buffer_sizes("int4", 1, 3, 5, 2)[0] == 8  # 15 numbers, the last nibble is padding
    assert sum(buffer_sizes("int8", 2, 0, 5, 2)) == 0
    # One entry more than a group holds: scales of a second group.
    assert buffer_sizes("int8", 2, KEY_GROUP, 5, 2)[1] == 20
    assert buffer_sizes("int8", 2, KEY_GROUP + 1, 5, 2)[1] == 40


def test_model_encoding_returns_the_tensors_themselves() -> None:
    keys, values = torch.randn(2, 1, 2, 3)
    assert encode(keys, values, "model")[0] is keys
    assert round_trip(keys, values, "model")[1] is values


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e7])
def test_what_has_no_scale_is_refused(bad: float) -> None:
    keys = torch.ones(1, 2, 2)
    keys[0, 1, 1] = bad
    with pytest.raises(TransferError, match="encoding model"):
        encode(keys, torch.ones(1, 2, 2), "int8")
