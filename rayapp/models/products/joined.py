"""Layers that read the same input as one product: queries, keys and values; gate and up.

Their weights lie one below the other in one tensor. Plain weights stay ordinary parameters, which
are views of it: modules, hooks and healing see nothing of it. Packed weights cannot be viewed in
part, so every layer becomes a :class:`JoinedPart`, which knows its rows of the joined product. The
engines run the product once (:class:`Products`); a part that is called as a module computes the
same from its own rows, unpacked anew in every call, which is right and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rayapp.models.products.packed import (
    PackedLinear,
    can_pack,
    multiplied,
    packed_weight,
    plain_linear,
)

Product = Callable[[torch.Tensor], torch.Tensor]
"""Takes inputs ``(..., in)``; returns the outputs of all its layers side by side."""


class PackedRows:
    """The packed weights of several layers in one, and their biases."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.packed = packed_weight(torch.cat([layer.weight.detach() for layer in layers]))
        self.bias = _joined_bias(layers)
        self._num_layers = len(layers)

    def are(self, layers: Sequence[Any]) -> bool:
        """Whether these are all the layers of the product, in its order."""
        places = [(getattr(x, "rows", None), getattr(x, "index", None)) for x in layers]
        return places == [(self, index) for index in range(self._num_layers)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of all layers for ``(..., in)``, side by side."""
        return multiplied(x, self.packed, self.bias)


class JoinedPart(nn.Module):
    """One layer of a joined product, in the place of the layer that it was.

    Args:
        rows: The product of all layers.
        index: The layer's place among them.
        start: The layer's first row.
        linear: The layer.
    """

    def __init__(self, rows: PackedRows, index: int, start: int, linear: nn.Linear) -> None:
        super().__init__()
        self.rows, self.index = rows, index
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._slice = slice(start, start + linear.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, unpacked anew in every call."""
        return self.rows.packed.to_dense()[self._slice].clone()

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's own bias."""
        return None if self.rows.bias is None else self.rows.bias[self._slice]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the plain weight."""
        return functional.linear(x, self.weight, self.bias)

    def plain(self) -> nn.Linear:
        """The same layer with a plain weight of its own."""
        bias = self.bias
        return plain_linear(self.weight, None if bias is None else bias.clone())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias


def join(layers: Sequence[nn.Linear]) -> list[nn.Module]:
    """Give layers that read the same input one weight; return the layers to put in their places.

    Packed where that is possible. Otherwise the same layers come back, whose parameters are now
    views of one tensor. All layers have a bias, or none has one.
    """
    if all(can_pack(layer) for layer in layers):
        rows, start, parts = PackedRows(layers), 0, list[nn.Module]()
        for index, layer in enumerate(layers):
            parts.append(JoinedPart(rows, index, start, layer))
            start += layer.out_features
        return parts
    sizes = [layer.out_features for layer in layers]
    weights = torch.cat([layer.weight.detach() for layer in layers]).split(sizes)
    bias = _joined_bias(layers)
    for index, layer in enumerate(layers):
        layer.weight = nn.Parameter(weights[index], requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.split(sizes)[index], requires_grad=False)
    return list(layers)


def is_product(layer: nn.Module) -> bool:
    """Whether a layer multiplies by its weight and does nothing else."""
    return type(layer) in (nn.Linear, PackedLinear, JoinedPart)


class Products:
    """Layers that read the same input as functions, which run joined layers as one product."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self._joined = _joined_product(layers)
        self._products = [] if self._joined else [product_of(layer) for layer in layers]

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of all layers for ``(..., in)`` in one tensor."""
        if self._joined is not None:
            return self._joined(x)
        return torch.cat([product(x) for product in self._products], dim=-1)

    def apart(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Outputs of all layers for ``(..., in)``, one tensor a layer."""
        if self._joined is not None:
            return self._joined(x).split(self._sizes, dim=-1)
        return [product(x) for product in self._products]


def _joined_product(layers: Sequence[Any]) -> Product | None:
    """The product of layers that share one weight; None if they do not."""
    first = layers[0]
    if isinstance(first, JoinedPart) and first.rows.are(layers):
        return first.rows
    if any(type(layer) is not nn.Linear for layer in layers):
        return None
    weight, bias = (_adjacent([getattr(x, name) for x in layers]) for name in ("weight", "bias"))
    if weight is None or (bias is None and any(layer.bias is not None for layer in layers)):
        return None
    return lambda x: functional.linear(x, weight, bias)


def product_of(layer: Any) -> Product:
    """One layer as a function."""
    bias = layer.bias
    if isinstance(layer, PackedLinear):
        packed = layer.packed
        return lambda x: multiplied(x, packed, bias)
    weight = layer.weight
    return lambda x: functional.linear(x, weight, bias)


def unpack(module: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put plain layers in place of the packed ones below ``module``.

    Args:
        module: A tree of modules, which is changed; those that share its weights are not.
        names: Names of the layers to unpack, as ``named_modules`` gives them; None unpacks all.
    """
    wanted = None if names is None else set(names)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, PackedLinear | JoinedPart) and (wanted is None or path in wanted):
            put(module, path, layer.plain())


def put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a path below ``module``."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters by name, packed weights among them: shape, type and device can be read."""
    yield from model.named_parameters()
    for path, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            yield f"{path}.weight", layer.packed
        elif isinstance(layer, JoinedPart):
            yield f"{path}.weight", layer.weight
            if layer.bias is not None:
                yield f"{path}.bias", layer.bias


def _joined_bias(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    if layers[0].bias is None:
        return None
    return torch.cat([layer.bias.detach() for layer in layers])


def _adjacent(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The tensor of which all these are views, one after the other; None if they are not."""
    there = [tensor for tensor in tensors if tensor is not None and tensor.is_contiguous()]
    if len(there) < len(tensors) or there[0].is_meta:
        return None
    place, storage = there[0].data_ptr(), there[0].untyped_storage().data_ptr()
    for tensor in there:
        if tensor.data_ptr() != place or tensor.untyped_storage().data_ptr() != storage:
            return None
        place += tensor.nbytes
    first = there[0].detach()
    shape = (sum(tensor.shape[0] for tensor in there), *first.shape[1:])
    return first.as_strided(shape, first.stride())
