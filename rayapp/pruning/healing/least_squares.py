"""Linear least squares from sums of products, with a ridge that judging lines choose.

Lines are seen once, and only sums over their tokens are kept, in float64: X^T X, X^T Y and Y^T Y's
diagonal. From them a map is solved in milliseconds, for any strength of the ridge, and its error on
other lines is known without seeing those again.
Shapes: N = tokens, I = inputs, O = outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the ridge that are tried, as shares of the input's own sum of squares: scaling an
input changes nothing (project default)."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens, float64: of inputs with inputs, inputs with targets, and squared targets.

    ``targets_O`` are sums of squares, so that errors are relative to the targets.
    """

    inputs_II: torch.Tensor
    cross_IO: torch.Tensor
    targets_O: torch.Tensor
    num_tokens: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.inputs_II + other.inputs_II,
            self.cross_IO + other.cross_IO,
            self.targets_O + other.targets_O,
            self.num_tokens + other.num_tokens,
        )

    def squared_errors(self, map_IO: torch.Tensor) -> torch.Tensor:
        """Sum of squared errors of a map on these tokens, by output, ``(O,)``."""
        quadratic_O = (map_IO * (self.inputs_II @ map_IO)).sum(dim=0)
        return (self.targets_O - 2 * (map_IO * self.cross_IO).sum(dim=0) + quadratic_O).clamp(min=0)

    def solved(self, prior_IO: torch.Tensor, ridge: float) -> torch.Tensor:
        """The map of least squared error, drawn towards ``prior_IO`` by a ridge.

        It minimises |Y - X M|^2 + ridge |D (M - prior)|^2, where D^2 is the diagonal of X^T X. With
        a ridge of 0 it is the plain least-squares solution, if the inputs have full rank.
        """
        penalised_II = self.inputs_II + ridge * torch.diag(self.inputs_II.diagonal())
        rest_IO = self.cross_IO - self.inputs_II @ prior_IO
        factor_II, failed = torch.linalg.cholesky_ex(penalised_II)
        if failed:  # rank is lacking, and the ridge is too weak to make up for it
            return prior_IO + torch.linalg.pinv(penalised_II, hermitian=True) @ rest_IO
        return prior_IO + torch.cholesky_solve(rest_IO, factor_II)


def products(inputs_NI: torch.Tensor, other_NO: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of products, ``(I, O)``, float64."""
    return inputs_NI.to(torch.float64).T @ other_NO.to(torch.float64)


@dataclass(frozen=True)
class Solved:
    """A map, and its mean squared errors relative to those of the prior map's targets.

    ``ridge`` is None if no map was better than the prior on judging tokens.
    """

    map_IO: torch.Tensor
    ridge: float | None
    error_before: float
    error_after: float


def best_map(
    train: Moments,
    held_back: Moments,
    prior_IO: torch.Tensor,
    *,
    scale: float,
    ridges: Iterable[float] = RIDGES,
) -> Solved:
    """The map whose ridge is best on judging tokens, solved anew from all tokens.

    Args:
        train: Sums of the tokens that a ridge is tried with.
        held_back: Sums of the tokens that judge it.
        prior_IO: The map that the ridge draws to, and that stays if none is better.
        scale: Size that errors are divided by: the judging targets' own sum of squares.
        ridges: Strengths to try.
    """
    before = float(held_back.squared_errors(prior_IO).sum()) / scale
    errors = {
        ridge: float(held_back.squared_errors(train.solved(prior_IO, ridge)).sum()) / scale
        for ridge in ridges
    }
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < before:
        return Solved(prior_IO, None, before, before)
    return Solved((train + held_back).solved(prior_IO, best), best, before, errors[best])
