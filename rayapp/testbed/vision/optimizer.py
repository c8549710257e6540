"""Muon for the matrices of a model's blocks, AdamW for everything else.

The rules are those of :mod:`rayapp.testbed.muon`, for the modules of transformers, which keep every
matrix apart: those of one shape are stacked, so that a Newton-Schulz step is one operation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch

from rayapp.testbed.muon import orthogonalize

_BLOCKS = (".layers.",)


def is_block_matrix(name: str, weight: torch.Tensor) -> bool:
    """Whether Muon trains a weight: the matrices of attention and MLP, by their names."""
    return weight.ndim == 2 and any(part in name for part in _BLOCKS)


class Optimizer:
    """Both rules over named weights that change in place.

    Args:
        weights: The weights to train; a weight without a gradient stays as it is.
        matrix_lr: Learning rate of Muon.
        vector_lr: Learning rate of AdamW.
        weight_decay: Decoupled decay of the matrices, times the learning rate.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        *,
        matrix_lr: float,
        vector_lr: float,
        weight_decay: float,
    ) -> None:
        self.weights = dict(weights)
        self.matrix_lr, self.vector_lr, self.weight_decay = matrix_lr, vector_lr, weight_decay
        self.state: dict[str, torch.Tensor] = {}

    def _slot(self, kind: str, name: str, like: torch.Tensor) -> torch.Tensor:
        return self.state.setdefault(f"{kind}.{name}", torch.zeros_like(like))

    def _stacks(self) -> Iterator[list[str]]:
        """Names of the matrices with a gradient, by shape."""
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, weight in self.weights.items():
            if weight.grad is not None and is_block_matrix(name, weight):
                by_shape[weight.shape].append(name)
        yield from by_shape.values()

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Take one step with learning rates times ``scale``, and forget the gradients."""
        for names in self._stacks():
            self._update_matrices(names, self.matrix_lr * scale)
        for name, weight in self.weights.items():
            if weight.grad is not None and not is_block_matrix(name, weight):
                self._update_vector(name, weight, weight.grad, self.vector_lr * scale)
            weight.grad = None

    def _update_matrices(self, names: list[str], rate: float) -> None:
        directions = []
        for name in names:
            gradient = self.weights[name].grad
            assert gradient is not None
            momentum = self._slot("momentum", name, gradient).lerp_(gradient, 0.05)
            directions.append(gradient.lerp(momentum, 0.95))
        updates = orthogonalize(torch.stack(directions)).unbind(0)
        for name, update in zip(names, updates, strict=True):
            rows, columns = update.shape
            self.weights[name].mul_(1 - rate * self.weight_decay)
            self.weights[name].add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _update_vector(
        self, name: str, weight: torch.Tensor, gradient: torch.Tensor, rate: float
    ) -> None:
        steps = self._slot("steps", name, torch.zeros(())).add_(1).item()
        first = self._slot("first", name, gradient).lerp_(gradient, 0.1)
        second = self._slot("second", name, gradient).lerp_(gradient.square(), 0.05)
        first_hat = first / (1 - 0.9**steps)
        second_hat = second / (1 - 0.95**steps)
        weight.add_(first_hat / (second_hat.sqrt() + 1e-8), alpha=-rate)
