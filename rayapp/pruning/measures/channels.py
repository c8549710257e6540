"""Width in place of depth: channels of prefill's MLPs that prompts use least.

A baseline for plans of blocks: it takes as many parameters from prefill, a few channels of every
MLP in place of whole blocks. A channel counts as much as its states weigh in the products of
``down_proj``, the sum over outputs of ``|W_ij| ||X_j||`` (Wanda-sp, arXiv:2312.11983). All MLPs
lose the same share, attention loses nothing, and states are those of prompts (project defaults).
Quality is that of smaller matrices, while the zeros that stand for missing channels are still kept
and multiplied, so such a plan has neither speed nor parameter bytes of its own.

Shapes: T = prompt tokens, E = hidden size, I = channels of an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rayapp.errors import InputError
from rayapp.models.blocks import find_decoder
from rayapp.models.healed import HealedWeights

_OF_MLP = ("gate_proj", "up_proj", "down_proj")
_OF_ATTENTION = ("q_proj", "o_proj")
"""Layers that a missed block of prefill has no use for; its keys and values are still written."""


def without_channels(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_blocks: int
) -> HealedWeights:
    """Take the least channels of all MLPs of prefill, as many parameters as some blocks have.

    Args:
        model: A dense model, which does not change.
        prompts: Token ids of the prompts that channels are judged by.
        num_blocks: Number of blocks whose parameters, without those of keys and values, are taken.

    Returns:
        The ``down_proj`` of prefill's blocks, with zeros for the channels that are missing.

    Raises:
        InputError: All MLPs together have fewer parameters than so many blocks.
    """
    layers = find_decoder(model).layers
    share = num_blocks * _missed(layers[0]) / (len(layers) * _size(layers[0].mlp, _OF_MLP))
    if share >= 1:
        raise InputError(
            f"num_blocks={num_blocks}: so many blocks have more parameters than all MLPs of the "
            f"model, which has {len(layers)}; take fewer"
        )
    tensors = {}
    for number, norms_I in enumerate(_norms(model, prompts)):
        weight_EI = layers[number].mlp.down_proj.weight.detach()
        scores_I = weight_EI.to(torch.float32).abs().sum(dim=0) * norms_I
        kept_EI = weight_EI.clone()
        kept_EI[:, scores_I.argsort()[: round(share * len(scores_I))]] = 0
        tensors[f"layers.{number}.mlp.down_proj.weight"] = kept_EI
    return HealedWeights.of({"prefill": tensors})


def _missed(layer: nn.Module) -> int:
    """Number of parameters of a block that prefill need not have if only its KV is written."""
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    return _size(attention, _OF_ATTENTION) + _size(mlp, _OF_MLP)


def _size(module: nn.Module, names: Sequence[str]) -> int:
    return sum(p.numel() for name in names for p in module.get_submodule(name).parameters())


@torch.no_grad()
def _norms(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The norm of every channel's states over all tokens of the prompts, by block."""
    layers = find_decoder(model).layers
    squares = [torch.zeros(layer.mlp.down_proj.in_features) for layer in layers]

    def note(number: int, states_TI: torch.Tensor) -> None:
        squares[number] += states_TI.to(torch.float32).square().sum(dim=0).cpu()

    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, number=number: note(number, inputs[0].flatten(0, -2))
        )
        for number, layer in enumerate(layers)
    ]
    try:
        for prompt in prompts:
            model(torch.tensor([list(prompt)], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [square_I.sqrt().to(model.device) for square_I in squares]
