"""The short cuts of attention against transformers' own, which repeats keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rayapp.models import attention
from rayapp.models.attention import packed_sdpa
from rayapp.models.real_tokens import RealTokens


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_queries_give_causal_attention(dtype):
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, h, 600, 16).to(dtype) for h in (6, 2, 2))
    found = attention._in_query_blocks(query, keys, values, None, 0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=0.3, enable_gqa=True
    )
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.03}
    torch.testing.assert_close(found.transpose(1, 2), wanted, **close)


@pytest.mark.parametrize("window", [None, 90])
def test_chunks_that_see_a_prefix_run_in_blocks_of_queries_too(window, monkeypatch):
    torch.manual_seed(0)
    query = torch.randn(1, 6, 300, 16).bfloat16()
    keys, values = (torch.randn(1, 2, 500, 16).bfloat16() for _ in range(2))
    distance = torch.arange(200, 500)[:, None] - torch.arange(500)[None]
    mask = ((distance >= 0) & (distance < (window or 500)))[None, None]
    batches, module = RealTokens.full((1, 300)), SimpleNamespace(num_key_value_groups=3)
    found = []
    for has_amx in (False, True):
        monkeypatch.setattr(attention, "_HAS_AMX", has_amx)
        assert attention._pays_in_blocks(query, mask) is not has_amx
        found.append(
            packed_sdpa(module, query, [keys], [values], [mask], scaling=0.3, real_tokens=batches)[
                0
            ]
        )
    torch.testing.assert_close(*found, rtol=0, atol=0.03)


def test_blocks_of_queries_are_for_long_bf16_prompts_of_joined_batches(monkeypatch):
    monkeypatch.setattr(attention, "_HAS_AMX", False)
    long, short = (torch.zeros(1, 2, n, 8, dtype=torch.bfloat16) for n in (257, 256))
    assert attention._pays_in_blocks(long, None)
    assert not attention._pays_in_blocks(short, None)
    assert not attention._pays_in_blocks(long.float(), None)
    assert not attention._pays_in_blocks(long, torch.zeros(1, 1, 257, 257))
    assert not attention._pays_in_blocks(long, torch.zeros(1, 1, 257, 257, dtype=torch.bool))
    monkeypatch.setattr(attention, "_HAS_AMX", True)
    assert not attention._pays_in_blocks(long, None)
