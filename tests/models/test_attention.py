"""The short cuts of attention against transformers' own, which repeats keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rayapp.models.attention import packed_sdpa


@pytest.mark.parametrize("num_queries", [1, 2, 7, 40])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("added", [False, True])
def test_nothing_is_repeated_and_nothing_changes(num_queries, groups, added):
    generator = torch.Generator().manual_seed(num_queries * 10 + groups)
    query = torch.randn(3, 2 * groups, num_queries, 16, generator=generator)
    keys, values = (torch.randn(3, 2, 11, 16, generator=generator) for _ in range(2))
    mask = torch.rand(3, 1, num_queries, 11, generator=generator) < 0.6
    mask[..., 0] = True
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    wanted, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=0.2)
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if added else mask
    found, _ = packed_sdpa(module, query, keys, values, given, scaling=0.2)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    other, _ = packed_sdpa(module, query, keys, values, torch.ones_like(mask), scaling=0.2)
    assert not torch.allclose(other, wanted, atol=1e-3), "the mask counts"
