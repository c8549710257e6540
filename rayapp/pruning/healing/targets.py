"""Targets of fits in closed form, and the parameters that a solved map becomes.

Shapes: N = tokens, E = hidden size, I = inputs (E, and one more with a bias), O = outputs, H = KV
heads, D = head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rayapp.models.healed import BRIDGE
from rayapp.pruning.healing.least_squares import Moments


@dataclass(frozen=True)
class Rows:
    """Tokens of one chunk: states that enter a fit's first block and its last, and weights.

    A weight is the number of tokens that a token counts as.
    """

    first_NE: torch.Tensor
    last_NE: torch.Tensor
    weights_N: torch.Tensor


class Target(ABC):
    """The target of a kind of fit, and the parameters that its map becomes."""

    has_bias: bool

    @abstractmethod
    def outputs(self, rows: Sequence[Rows]) -> list[torch.Tensor]:
        """The targets ``(N, O)`` of every chunk."""

    @abstractmethod
    def prior(self, moments: Moments) -> torch.Tensor:
        """The map of a block that is not healed, ``(I, O)``, float64."""

    @abstractmethod
    def tensors(self, map_IO: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters of a map, by their names in the block."""


class BridgeTarget(Target):
    """The change of the residual over a span; an unhealed span changes nothing."""

    has_bias = True

    def outputs(self, rows: Sequence[Rows]) -> list[torch.Tensor]:
        """Differences of the states, ``(N, E)``."""
        return [row.last_NE.float() - row.first_NE.float() for row in rows]

    def prior(self, moments: Moments) -> torch.Tensor:
        """A map to nothing."""
        return torch.zeros_like(moments.cross_IO)

    def tensors(self, map_IO: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight and the bias of a bridge."""
        weight_OI = map_IO[:-1].T.contiguous()
        return {f"{BRIDGE}.weight": weight_OI, f"{BRIDGE}.bias": map_IO[-1]}


class KVTarget(Target):
    """A block's keys before rotation, and its values.

    In a family that normalises keys (``k_norm``), only the direction of a head's key counts:
    there the targets are directions, in the mean length of the block's own keys.
    """

    def __init__(self, block: Any) -> None:
        attention = block.self_attn
        self._norm = block.input_layernorm
        self._projections = {"k_proj": attention.k_proj, "v_proj": attention.v_proj}
        self._head_dim: int = attention.head_dim if hasattr(attention, "k_norm") else 0
        self._num_keys: int = attention.k_proj.weight.shape[0]
        self.has_bias = attention.k_proj.bias is not None
        self._mean_H1: torch.Tensor | None = None

    def outputs(self, rows: Sequence[Rows]) -> list[torch.Tensor]:
        """Keys and values of the dense states that enter the block, side by side."""
        outputs = [self._keys_and_values(row.last_NE) for row in rows]
        if self._head_dim:
            self._keep_directions([output[:, : self._num_keys] for output in outputs])
        return outputs

    def _keys_and_values(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        normed_NE = self._norm(hidden_NE)
        made = [projection(normed_NE) for projection in self._projections.values()]
        return torch.cat(made, dim=-1).float()

    def _keep_directions(self, keys: Sequence[torch.Tensor]) -> None:
        """Give every head's keys one length, in place: the mean of their lengths."""
        heads = [keys_NO.unflatten(1, (-1, self._head_dim)) for keys_NO in keys]
        lengths = [heads_NHD.norm(dim=-1, keepdim=True) for heads_NHD in heads]
        if self._mean_H1 is None:  # the lines that are fitted come first, and decide for all
            self._mean_H1 = torch.cat(lengths).mean(dim=0)
        for heads_NHD, length_NH1 in zip(heads, lengths, strict=True):
            heads_NHD.mul_(self._mean_H1 / length_NH1.clamp(min=1e-12))

    def prior(self, moments: Moments) -> torch.Tensor:
        """The block's own projections, as maps of states before its norm's weight."""
        norm_E1 = self._norm.weight.double()[:, None]
        weights_IO = [p.weight.double().T * norm_E1 for p in self._projections.values()]
        prior_IO = torch.cat(weights_IO, dim=1)
        if not self.has_bias:
            return prior_IO
        biases = [p.bias.double() for p in self._projections.values()]
        return torch.cat([prior_IO, torch.cat(biases)[None]])

    def tensors(self, map_IO: torch.Tensor) -> dict[str, torch.Tensor]:
        """Projections, and biases in families that have them."""
        norm_E = self._norm.weight.double()
        weights_IO = map_IO[: len(norm_E)] / torch.where(norm_E == 0, torch.inf, norm_E)[:, None]
        split = [self._num_keys, map_IO.shape[1] - self._num_keys]
        tensors = {}
        for name, weight_IO in zip(self._projections, weights_IO.split(split, dim=1), strict=True):
            tensors[f"self_attn.{name}.weight"] = weight_IO.T.contiguous()
        if self.has_bias:
            for name, bias_O in zip(self._projections, map_IO[-1].split(split), strict=True):
                tensors[f"self_attn.{name}.bias"] = bias_O.clone()
        return tensors
