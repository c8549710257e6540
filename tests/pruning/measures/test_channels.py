"""Channels of MLPs: the least are taken, by brute force, and as many parameters as blocks have."""

from __future__ import annotations

import pytest
import torch

from rayapp.errors import InputError
from rayapp.models.blocks import find_decoder
from rayapp.pruning.measures.channels import without_channels

PROMPTS = [[5, 9, 200, 31, 7], [12, 3]]


def mlp_inputs(model):
    """What every ``down_proj`` reads, computed from the states before it, token by token."""
    layers, read = find_decoder(model).layers, []
    for prompt in PROMPTS:
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer, hidden in zip(layers, states, strict=False):
            inner = {}
            hook = layer.mlp.register_forward_pre_hook(lambda _, i, inner=inner: inner.update(x=i))
            position_ids = torch.arange(len(prompt))[None]
            rotary = find_decoder(model).rotary_emb(hidden, position_ids)
            layer(hidden, position_embeddings=rotary)
            hook.remove()
            (x,) = inner["x"]
            read.append(layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
    return [torch.cat([*read[n :: len(layers)]], dim=1)[0] for n in range(len(layers))]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_the_channels_that_weigh_least_are_gone(tiny_model, family):
    model = tiny_model(family)
    layers = find_decoder(model).layers
    with torch.no_grad():
        states = mlp_inputs(model)
    tensors = without_channels(model, PROMPTS, 1).stages["prefill"]
    assert len(tensors) == len(layers)
    for number, layer in enumerate(layers):
        weight, kept = layer.mlp.down_proj.weight, tensors[f"layers.{number}.mlp.down_proj.weight"]
        gone = (kept == 0).all(dim=0)
        assert torch.equal(kept[:, ~gone], weight[:, ~gone])
        importance = (weight.abs() * states[number].norm(dim=0)).sum(dim=0)
        assert importance[gone].max() <= importance[~gone].min()


def test_as_many_parameters_are_gone_as_blocks_have(tiny_model):
    model = tiny_model("llama")
    layer, hidden = find_decoder(model).layers[0], model.config.hidden_size
    tensors = without_channels(model, PROMPTS, 2).stages["prefill"].values()
    gone = sum(int((kept == 0).all(dim=0).sum()) for kept in tensors)
    wanted = 2 * sum(
        p.numel()
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp")
        for p in layer.get_submodule(name).parameters()
    )
    assert abs(3 * hidden * gone - wanted) <= 3 * hidden * len(tensors) / 2


def test_more_blocks_than_mlps_hold_are_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="num_blocks=4: so many blocks have more parameters"):
        without_channels(model, PROMPTS, 4)
