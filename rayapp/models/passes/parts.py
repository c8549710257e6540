"""The parts of a plain block as functions over its parameters, without the machinery of modules.

They compute what the modules of all supported families compute, operation by operation in the same
order, and write into memory of their own where the modules make new tensors. Therefore one RMS norm
holds on all paths: torch's ``rms_norm`` rounds otherwise in bf16. Only packed bf16 products of an
MLP round less often than the modules do.
Shapes: N = tokens in any leading shape, E = hidden size, R = heads, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rayapp.models.products.joined import Products, is_product, product_of
from rayapp.models.products.packed import PackedLinear, can_gate, gated

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of positions, ``(..., D)``; the first half of the sines is negated."""
Function = Callable[[torch.Tensor], torch.Tensor]


def is_plain(block: nn.Module) -> bool:
    """Whether a block computes what its parameters say: no hooks, and no replaced layers."""
    if any(_is_hooked(module) for module in block.modules()):
        return False
    layers = [module for name, module in block.named_modules() if name.endswith("_proj")]
    return all(is_product(layer) for layer in layers)


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def norm_of(module: Any) -> Function:
    """The RMS norm of a module as a function, which all supported families share."""
    weight_E, epsilon = module.weight, module.variance_epsilon

    def norm(x_NE: torch.Tensor) -> torch.Tensor:
        wide_NE = x_NE.float()
        scale_N1 = wide_NE.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        if wide_NE is x_NE:
            return (wide_NE * scale_N1).mul_(weight_E)
        return wide_NE.mul_(scale_N1).to(x_NE.dtype).mul_(weight_E)

    return norm


def mlp_of(norm_module: Any, mlp: Any) -> Function:
    """Norm and MLP of a block as a function of its hidden states, without the residual."""
    norm, act = norm_of(norm_module), mlp.act_fn
    if can_gate(mlp) and isinstance(mlp.gate_proj, PackedLinear):
        gate, up, outputs = mlp.gate_proj, mlp.up_proj, product_of(mlp.down_proj)
        return lambda hidden_NE: outputs(gated(norm(hidden_NE), gate, up))
    gate_up, down = Products([mlp.gate_proj, mlp.up_proj]), product_of(mlp.down_proj)

    def run(hidden_NE: torch.Tensor) -> torch.Tensor:
        gate_NM, up_NM = gate_up.apart(norm(hidden_NE))
        return down(act(gate_NM).mul_(up_NM))

    return run


def signed(rotary: tuple[torch.Tensor, torch.Tensor]) -> Rotary:
    """Cosines and sines as the model gives them, in the form of :data:`Rotary`."""
    cos, sin = rotary
    one, two = sin.chunk(2, dim=-1)
    return cos, torch.cat((-one, two), dim=-1)


def rotate(x_NRD: torch.Tensor, rotary_N1D: Rotary) -> torch.Tensor:
    """Apply rotary positions as all supported families do.

    They add ``x cos`` and ``(-x2, x1) sin``. Here the sign is in the sines, so that one small
    operation less is needed; the numbers are the same bit for bit.
    """
    cos_N1D, sin_N1D = rotary_N1D
    turned_NRD = x_NRD.roll(x_NRD.shape[-1] // 2, -1).mul_(sin_N1D)
    return (x_NRD * cos_N1D).add_(turned_NRD)
