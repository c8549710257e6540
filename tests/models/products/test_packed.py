from __future__ import annotations

import pytest
import torch
from torch import nn

from rayapp.errors import IntegrityError
from rayapp.models.blocks import decoder_blocks, signature_of
from rayapp.models.healed import HealedWeights, attach
from rayapp.models.products.joined import named_weights, unpack
from rayapp.models.products.packed import (
    PackedLinear,
    can_gate,
    gated,
    pack_products,
    weight_of,
)
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

IDS = torch.arange(40).view(2, 20)


class Forgetful:
    def update(self, keys, values, block):
        return keys, values


@torch.inference_mode()
def logits(model, plan=None):
    stack = BlockStack(model, plan or PruningPlan(), "prefill")
    return stack.logits(stack.run(stack.embed(IDS), torch.arange(20)[None], Forgetful()))


def packed(model):
    signature_of(model)
    pack_products(model, decoder_blocks(model))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_multiplies_as_a_plain_one(dtype, bias):
    plain = nn.Linear(40, 24, bias=bias).to(dtype)
    layer = PackedLinear(plain)
    for shape in ((40,), (3, 40), (2, 3, 40), (1, 0, 40)):
        with torch.inference_mode():
            torch.testing.assert_close(layer(torch.ones(shape, dtype=dtype)), plain(
                torch.ones(shape, dtype=dtype)))  # fmt: skip
    assert torch.equal(layer.weight, plain.weight)
    assert set(layer.state_dict()) == set(plain.state_dict())


class Mlp(nn.Module):
    """Gate, up and activation of an MLP."""

    def __init__(self, dtype, act, *, bias):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(40, 2400, bias=bias).to(dtype) for _ in range(2))
        self.act_fn = act

    def pack(self):
        self.gate_proj, self.up_proj = PackedLinear(self.gate_proj), PackedLinear(self.up_proj)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 70, 40)])
def test_gated_products_round_less_often(shape, bias):
    torch.manual_seed(0)
    mlp = Mlp(torch.bfloat16, nn.SiLU(), bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        gate, up = (
            nn.functional.linear(
                x.double(), layer.weight.double(), layer.bias.double() if bias else None
            )
            for layer in (mlp.gate_proj, mlp.up_proj)
        )
        exact = nn.functional.silu(gate) * up
        modules = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        mlp.pack()
        assert can_gate(mlp)
        found = gated(x, mlp.gate_proj, mlp.up_proj)
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0.02, atol=0.01)
    assert (found - exact).abs().mean() <= (modules - exact).abs().mean()


def test_other_types_and_activations_are_not_gated():
    assert can_gate(Mlp(torch.bfloat16, nn.SiLU(), bias=False))
    assert not can_gate(Mlp(torch.float32, nn.SiLU(), bias=False))
    assert not can_gate(Mlp(torch.float16, nn.SiLU(), bias=False))
    assert not can_gate(Mlp(torch.bfloat16, nn.GELU(), bias=False))


def test_gradients_flow_through_a_packed_layer():
    plain, x = nn.Linear(8, 4), torch.ones(2, 8, requires_grad=True)
    [wanted] = torch.autograd.grad(plain(x).sum(), x)
    [found] = torch.autograd.grad(PackedLinear(plain)(x).sum(), x)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_packed_model_computes_the_same_and_holds_no_plain_weight(tiny_model, family):
    model = tiny_model(family)
    wanted, fingerprint = logits(model), signature_of(model)
    names = {name for name, _ in model.named_parameters()}
    grown = pack_products(model, decoder_blocks(model))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert signature_of(model) == fingerprint
    left = {name for name, _ in model.named_parameters()}
    assert not any("_proj.weight" in name for name in left)
    assert {name for name, _ in named_weights(model)} >= names
    tied = model.config.tie_word_embeddings
    assert grown == (weight_of(model.get_output_embeddings()).nelement() * 4 if tied else 0)


def test_a_saved_state_is_plain(tiny_model):
    model = tiny_model("llama")
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = packed(model).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_unpacking_a_stage_leaves_the_model_packed(tiny_model):
    model = packed(tiny_model("llama"))
    wanted = logits(model)
    stack = BlockStack(model, PruningPlan(), "decode")
    unpack(stack.blocks[1])
    assert not any(isinstance(layer, PackedLinear) for layer in stack.blocks[1].modules())
    assert isinstance(model.model.layers[1].mlp.up_proj, PackedLinear)
    assert torch.equal(logits(model), wanted)


def test_healed_tensors_replace_packed_ones(tiny_model):
    plain, other = tiny_model("llama"), tiny_model("llama")
    name = "layers.2.mlp.down_proj.weight"
    tensor = torch.randn_like(plain.model.layers[2].mlp.down_proj.weight)
    healed = HealedWeights.of({"prefill": {name: tensor}, "decode": {}})
    plan = PruningPlan(model=signature_of(plain), healed=healed.digest)
    results = []
    for model in (plain, packed(other)):
        attach(model, healed)
        results.append(logits(model, plan))
        assert not torch.allclose(results[-1], logits(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_float16_stays_plain_and_a_fingerprint_comes_first(tiny_model):
    model = tiny_model("llama")
    model.rayapp_fingerprint = None
    with pytest.raises(IntegrityError, match="after the fingerprint"):
        pack_products(model, decoder_blocks(model))
    half = packed(tiny_model("llama").half())
    assert not any(isinstance(layer, PackedLinear) for layer in half.modules())
