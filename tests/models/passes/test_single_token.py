"""One token per sequence without modules: the same numbers as the modules give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayapp.models.blocks import signature_of
from rayapp.models.passes.single_token import SingleTokenStack
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
MODES = {1: "attention_only", 2: "mlp_only", 3: "removed"}


class FixedCache:
    """Answers every update with the same past and the new entry."""

    def __init__(self, stack: BlockStack, batch: int, num_entries: int) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (stack.num_blocks, batch, stack.num_kv_heads, num_entries, stack.head_dim)
        self.keys = torch.randn(shape, generator=generator).to(stack.dtype)
        self.values = torch.randn(shape, generator=generator).to(stack.dtype)
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys, values, block):
        self.written[block] = (keys.clone(), values.clone())
        return torch.cat([self.keys[block], keys], 2), torch.cat([self.values[block], values], 2)


def stack_of(model, *, modes=None) -> BlockStack:
    plan = PruningPlan()
    if modes:
        plan = PruningPlan.model_validate(
            {"model": signature_of(model).model_dump(), "decode": {"blocks": modes}}
        )
    return BlockStack(model, plan, "decode")


def inputs(batch: int):
    generator = torch.Generator().manual_seed(batch)
    token_ids = torch.randint(0, 250, (batch, 1), generator=generator)
    positions = torch.randint(9, 200, (batch, 1), generator=generator)
    mask = torch.rand((batch, 1, 1, 10), generator=generator) < 0.7
    mask[..., -1] = True
    return token_ids, positions, {0: mask, 4: mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modes", [None, MODES])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_numbers_are_those_of_the_modules(tiny_model, family, modes, dtype):
    stack = stack_of(tiny_model(family).to(dtype), modes=modes)
    single = SingleTokenStack(stack)
    assert single.is_plain
    for batch in (1, 4):
        token_ids, positions, masks = inputs(batch)
        hidden = stack.embed(token_ids)
        expected_cache, found_cache = (FixedCache(stack, batch, 9) for _ in range(2))
        expected = stack.run(hidden, positions, expected_cache, masks)
        found = single.run(hidden, positions, found_cache, masks)
        assert torch.equal(found, expected)
        assert found_cache.written.keys() == expected_cache.written.keys()
        for block, (keys, values) in expected_cache.written.items():
            assert torch.equal(found_cache.written[block][0], keys)
            assert torch.equal(found_cache.written[block][1], values)


class Doubled(nn.Linear):
    """A linear layer that a plain product does not describe."""

    def forward(self, x):
        return 2 * super().forward(x)


def hook(stack: BlockStack) -> None:
    stack.blocks[2].mlp.register_forward_hook(lambda module, args, output: output * 0.5)


def replace(stack: BlockStack) -> None:
    stack.blocks[1].mlp.up_proj.__class__ = Doubled


@pytest.mark.parametrize("change", [hook, replace])
def test_what_is_not_plain_runs_as_modules(tiny_model, change):
    stack = stack_of(tiny_model("llama"))
    token_ids, positions, masks = inputs(2)
    hidden = stack.embed(token_ids)
    before = SingleTokenStack(stack).run(hidden, positions, FixedCache(stack, 2, 9), masks)
    change(stack)
    single = SingleTokenStack(stack)
    assert not single.is_plain
    after = single.run(hidden, positions, FixedCache(stack, 2, 9), masks)
    assert torch.equal(after, stack.run(hidden, positions, FixedCache(stack, 2, 9), masks))
    assert not torch.equal(after, before)
