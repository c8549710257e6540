"""Linear layers whose weights lie in the order in which oneDNN multiplies, on a CPU.

``linear`` arranges a weight anew in every call, and a weight that is packed once saves that. How
much depends on the machine; ``benchmarks/search_speed.py`` measures whole searches, not single
products. A layer holds its packed weight in place of the plain one, never beside it. The plain
weight is unpacked bit for bit where it is asked for: where gradients are needed, where healed
tensors replace it, and where a state is saved. Layers on other devices or in other element types
than float32 and bf16 stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from rayapp.errors import IntegrityError

_PACKED_TYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """A linear layer that holds its weight packed; results differ from ``linear`` by rounding."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, unpacked anew in every call."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; gradients flow through the plain weight."""
        if (x.requires_grad and torch.is_grad_enabled()) or not x.numel():
            return functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def plain(self) -> nn.Linear:
        """The same layer with a plain weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear

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
    head: Any = model.get_output_embeddings()
    if not _can_pack(head):
        return 0
    table: Any = model.get_input_embeddings()
    is_tied = head.weight is table.weight
    model.set_output_embeddings(PackedLinear(head))
    return head.weight.nbytes if is_tied else 0


def unpack(module: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put plain layers in place of the packed ones below ``module``.

    Args:
        module: A tree of modules, which is changed; those that share its weights are not.
        names: Names of the layers to unpack, as ``named_modules`` gives them; None unpacks all.
    """
    wanted = None if names is None else set(names)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, PackedLinear) and (wanted is None or path in wanted):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, layer.plain())


def weight_of(layer: Any) -> torch.Tensor:
    """A layer's weight as it is held, to read shape, type and device without unpacking."""
    return layer.packed if isinstance(layer, PackedLinear) else layer.weight


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters by name, packed weights among them: shape, type and device can be read."""
    yield from model.named_parameters()
    for path, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            yield f"{path}.weight", layer.packed


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if _can_pack(child):
            setattr(module, name, PackedLinear(child))  # type: ignore[arg-type]
        else:
            _replace(child)


def _can_pack(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or layer.weight.device.type != "cpu":
        return False
    supported = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return layer.weight.dtype in _PACKED_TYPES and supported
