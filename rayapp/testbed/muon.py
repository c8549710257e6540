"""The optimiser's step: Muon for stacked matrices, AdamW for everything else.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, by
five Newton-Schulz iterations. Here they run in bf16 on whole stacks, every rank takes its share of
the matrices, and the ranks exchange the results: ``torch.optim.Muon`` does one matrix at a time on
every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rayapp.testbed.network import MATRICES, Weights

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack_LOI: torch.Tensor) -> torch.Tensor:
    """Push every singular value of every matrix towards 1.

    Args:
        stack_LOI: Matrices, ``(L, out, in)``.

    Returns:
        Nearly semi-orthogonal matrices of the same shape, bf16.
    """
    tall = stack_LOI.shape[1] > stack_LOI.shape[2]
    x = (stack_LOI.mT if tall else stack_LOI).to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


@dataclass(slots=True)
class Optimizer:
    """State and hyper-parameters of both rules; ``update`` applies one step in place.

    Attributes:
        matrix_lr: Learning rate of Muon.
        vector_lr: Learning rate of AdamW.
        weight_decay: Decoupled decay of the matrices, times the learning rate.
        num_steps: Number of steps taken.
        state: ``momentum.<name>``, ``first.<name>``, ``second.<name>``: one tensor per weight.
    """

    matrix_lr: float
    vector_lr: float
    weight_decay: float
    num_steps: int = 0
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def _slot(self, kind: str, name: str, like: torch.Tensor) -> torch.Tensor:
        return self.state.setdefault(f"{kind}.{name}", torch.zeros_like(like))

    @torch.no_grad()
    def update(
        self, weights: Weights, gradients: Weights, scale: float, exchange: Exchange
    ) -> None:
        """Take one step.

        Args:
            weights: Weights, changed in place.
            gradients: Their gradients, already averaged over the ranks.
            scale: Factor on both learning rates (the schedule's).
            exchange: Says which share of the matrices is this rank's, and how the ranks swap them.
        """
        self.num_steps += 1
        directions: Weights = {}
        for name in MATRICES:
            momentum = self._slot("momentum", name, gradients[name])
            momentum.lerp_(gradients[name], 0.05)
            directions[name] = gradients[name].lerp(momentum, 0.95)
        for name, update in exchange.orthogonalized(directions).items():
            rows, columns = update.shape[1:]
            rate = self.matrix_lr * scale
            weights[name].mul_(1 - rate * self.weight_decay)
            weights[name].add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)
        for name in gradients.keys() - set(MATRICES):
            self._update_vector(name, weights[name], gradients[name], scale)

    def _update_vector(
        self, name: str, weight: torch.Tensor, gradient: torch.Tensor, scale: float
    ) -> None:
        first = self._slot("first", name, gradient).lerp_(gradient, 0.1)
        second = self._slot("second", name, gradient).lerp_(gradient.square(), 0.05)
        first_hat = first / (1 - 0.9**self.num_steps)
        second_hat = second / (1 - 0.95**self.num_steps)
        weight.add_(first_hat / (second_hat.sqrt() + 1e-8), alpha=-self.vector_lr * scale)


class Exchange:
    """The exchange of one process alone, which owns every matrix."""

    def average(self, gradients: Weights) -> Weights:
        """Average gradients over the ranks; a single rank's are the average."""
        return gradients

    def orthogonalized(self, directions: Weights) -> Weights:
        """Orthogonalise every stack of matrices."""
        return {name: orthogonalize(stack) for name, stack in directions.items()}


class RankExchange(Exchange):
    """The exchange of several processes in a ``torch.distributed`` group.

    Every rank owns a slice of every stack.
    """

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.num_ranks = torch.distributed.get_world_size()

    def average(self, gradients: Weights) -> Weights:
        """Average gradients over the ranks, in one message."""
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        torch.distributed.all_reduce(flat)
        flat /= self.num_ranks
        parts = flat.split([gradient.numel() for gradient in gradients.values()])
        return {
            name: part.view_as(gradient)
            for (name, gradient), part in zip(gradients.items(), parts, strict=True)
        }

    def orthogonalized(self, directions: Weights) -> Weights:
        """Orthogonalise this rank's slice of every stack and swap slices, in one message."""
        mine = [
            orthogonalize(stack.tensor_split(self.num_ranks)[self.rank])
            for stack in directions.values()
        ]
        flat = torch.cat([part.flatten() for part in mine])
        received = [torch.empty_like(flat) for _ in range(self.num_ranks)]
        torch.distributed.all_gather(received, flat)
        sizes = [part.numel() for part in mine]
        pieces = [message.split(sizes) for message in received]
        return {
            name: torch.cat([piece[index] for piece in pieces]).view_as(stack)
            for index, (name, stack) in enumerate(directions.items())
        }
