from __future__ import annotations

import pytest
import torch

from rayapp.models.real_tokens import RealTokens


def test_joined_and_apart_are_inverse_up_to_padding():
    valid = [torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.ones(1, 2).bool()]
    tokens = RealTokens(valid)
    batches = [torch.randn(2, 3, 4), torch.randn(1, 2, 4)]
    joined = tokens.joined(batches)
    assert tokens.counts == [5, 2]
    assert torch.equal(joined[0], torch.cat([batches[0][valid[0]], batches[1][0]]))
    for found, wanted, mask in zip(tokens.apart(joined), batches, valid, strict=True):
        assert torch.equal(found, wanted * mask[..., None])


def test_heads_come_apart_as_attention_wants_them():
    tokens = RealTokens.full((2, 3), (1, 4))
    row_1HND = torch.randn(1, 5, 10, 8)
    first, second = tokens.heads_apart(row_1HND)
    assert first.shape == (2, 5, 3, 8)
    assert second.shape == (1, 5, 4, 8)
    assert torch.equal(first[1, :, 2], row_1HND[0, :, 5])


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_a_batch_may_be_empty(shape):
    tokens = RealTokens.full(shape, (1, 2))
    joined = tokens.joined([torch.zeros(*shape, 4), torch.ones(1, 2, 4)])
    assert joined.shape == (1, 2, 4)
    assert tokens.apart(joined)[0].shape == (*shape, 4)
