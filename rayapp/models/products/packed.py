"""Linear layers whose weights lie in the order in which oneDNN multiplies, on a CPU.

``linear`` arranges a weight anew in every call, and a weight that is packed once saves that. How
much depends on the machine: ``benchmarks/decode_engine.py`` measures steps of the engines, and
``benchmarks/search_speed.py`` whole searches. A layer holds its packed weight in place of the
plain one, never beside it. The plain weight is unpacked bit for bit where it is asked for: where
gradients are needed, where healed tensors replace it, and where a state is saved. Layers on other
devices or in other element types than float32 and bf16 stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from rayapp.errors import IntegrityError

PACKED_TYPES = (torch.float32, torch.bfloat16)
"""Element types in which oneDNN multiplies by packed weights."""
_ROWS = 8
"""Number of rows for which weights are laid out. oneDNN's layout for 8 rows was the fastest, or
within a tenth of it, at 1 to 1,024 rows (tried on a CPU with AMX; project default)."""


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight as oneDNN multiplies by it; ``to_dense`` gives the plain one back, bit for bit."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)


def multiplied(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``linear`` with a packed weight; the last dimension of ``x`` is that of the weight."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def can_gate(mlp: Any) -> bool:
    """Whether :func:`gated` takes the layers of an MLP, packed already or not: bf16 and SiLU.

    In float32 it does not: there results are those of the modules, operation by operation.
    """
    layers = (mlp.gate_proj, mlp.up_proj)
    are_packed = all(isinstance(layer, PackedLinear) or can_pack(layer) for layer in layers)
    is_silu = isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)
    return is_silu and are_packed and weight_of(mlp.gate_proj).dtype == torch.bfloat16


def gated(x: torch.Tensor, gate: PackedLinear, up: PackedLinear) -> torch.Tensor:
    """SiLU of the gate's outputs times those of ``up``, rounded twice and not four times."""
    silu = torch.ops.mkldnn._linear_pointwise(x, gate.packed, gate.bias, "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, silu, up.packed, up.bias, "mul")


class PackedLinear(nn.Module):
    """A linear layer that holds its weight packed; results differ from ``linear`` by rounding.

    Args:
        linear: The layer; its weight is plain, or packed already.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight
        self.packed = weight if weight.is_mkldnn else packed_weight(weight)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, unpacked anew in every call."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; gradients flow through the plain weight."""
        if (x.requires_grad and torch.is_grad_enabled()) or not x.numel():
            return functional.linear(x, self.weight, self.bias)
        return multiplied(x, self.packed, self.bias)

    def plain(self) -> nn.Linear:
        """The same layer with a plain weight."""
        return plain_linear(self.weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}weight"] = self.weight


def pack_products(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> int:
    """Pack the products of ``blocks`` and of the head, in a model that nobody else holds.

    A head that is tied to the embeddings becomes a packed copy of them, since rows can only be
    looked up in a plain table.

    Returns:
        The bytes that the model has grown by: those of a tied head, otherwise 0.

    Raises:
        IntegrityError: The model's fingerprint, which needs plain weights, was not taken before.
    """
    if getattr(model, "rayapp_fingerprint", None) is None:
        raise IntegrityError("products are packed after the fingerprint is taken; load the model")
    for block in blocks:
        _replace(block)
    return pack_head(model)


def pack_head(model: PreTrainedModel) -> int:
    """Pack the head; return the bytes of a copy of the embeddings, 0 without one."""
    head: Any = model.get_output_embeddings()
    if not can_pack(head):
        return 0
    table: Any = model.get_input_embeddings()
    is_tied = head.weight is table.weight
    model.set_output_embeddings(PackedLinear(head))
    return head.weight.nbytes if is_tied else 0


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer with these tensors, which need no gradient."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def weight_of(layer: Any) -> torch.Tensor:
    """A layer's weight as it is held, to read shape, type and device without unpacking."""
    return layer.packed if isinstance(layer, PackedLinear) else layer.weight


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if can_pack(child):
            setattr(module, name, PackedLinear(child))  # type: ignore[arg-type]
        else:
            _replace(child)


def can_pack(layer: nn.Module) -> bool:
    """Whether a layer is a linear one on a CPU, of an element type that oneDNN multiplies fast."""
    return type(layer) is nn.Linear and can_pack_weight(layer.weight)


def can_pack_weight(weight: torch.Tensor) -> bool:
    """Whether a plain weight lies on a CPU that has the operations, in a type that they take."""
    if weight.device.type != "cpu" or weight.is_mkldnn:
        return False
    supported = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return weight.dtype in PACKED_TYPES and supported
