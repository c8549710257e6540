"""A quadratic model of scores: effects of single units, and interactions of two.

CBO (arXiv:2602.00161) ranks removals by ``x^T H x`` with ``H`` from gradients. Ours is fitted to
**real scores** by ridge regression, over the units of both stages, so it holds the coupling between
the stages too. Everything below is a project default, chosen by replaying searches on exhaustively
scored spaces of the test-bed (2 to 4 of 12 blocks removed per stage).

The modelled quantity is the **square root** of how much a candidate loses against the dense model.
The losses of one space span five orders of magnitude and saturate at the top: raw, the few worst
sets would decide the fit, and a logarithm would spend it on sets that lose next to nothing. The KL
is a squared norm for small changes, so its root is about linear in a change.
Shapes: M = variables (units of prefill, then of decode), N = observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayapp.plan import STAGES
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space

Array = NDArray[np.float64]

PENALTY = 0.1
"""Ridge penalty, the same for effects and interactions."""


@dataclass(frozen=True)
class Quadratic:
    """The function ``linear . x + sum over i < j of pairs[i, j] x_i x_j``.

    ``pairs_MM`` is symmetric with a zero diagonal.
    """

    linear_M: Array
    pairs_MM: Array

    def predict(self, features_NM: Array) -> Array:
        """Predictions, ``(N,)``, in the unit of the fitted values; they rank candidates."""
        interactions_N = ((features_NM @ self.pairs_MM) * features_NM).sum(axis=1) / 2
        return features_NM @ self.linear_M + interactions_N

    @classmethod
    def additive(cls, effects_M: Array) -> Quadratic:
        """A model of single effects alone, without interactions."""
        return cls(effects_M, np.zeros((len(effects_M), len(effects_M))))

    @classmethod
    def fitted(cls, features_NM: Array, targets_N: Array) -> Quadratic:
        """The ridge solution, in its dual form: one N x N system, however many interactions."""
        overlap_NN = features_NM @ features_NM.T
        shared_pairs_NN = overlap_NN * (overlap_NN - 1) / 2
        kernel_NN = overlap_NN + shared_pairs_NN + PENALTY * np.eye(len(targets_N))
        weights_N = np.linalg.solve(kernel_NN, targets_N)
        pairs_MM = (features_NM.T * weights_N) @ features_NM
        np.fill_diagonal(pairs_MM, 0.0)
        return cls(weights_N @ features_NM, pairs_MM)


def root_losses(scores_N: Array, dense_score: float) -> Array:
    """The values to fit: signed square roots of scores above the dense model's."""
    losses_N = scores_N - dense_score
    return np.sign(losses_N) * np.sqrt(np.abs(losses_N))


def singles(space: Space) -> list[Candidate]:
    """Every unit that may go, removed alone, for the stages that remove any; ascending."""
    candidates: list[Candidate] = []
    if space.count("prefill"):
        candidates += [space.candidate((unit,), ()) for unit in space.pool("prefill")]
    if space.count("decode"):
        candidates += [space.candidate((), (unit,)) for unit in space.pool("decode")]
    return sorted(candidates)


def features(space: Space, candidates: Sequence[Candidate]) -> Array:
    """A matrix ``(N, M)`` with a 1 for every unit that a candidate removes."""
    found_NM = np.zeros((len(candidates), len(STAGES) * space.num_units))
    for row, candidate in enumerate(candidates):
        prefill, decode = space.units(candidate)
        found_NM[row, list(prefill)] = 1.0
        found_NM[row, [space.num_units + unit for unit in decode]] = 1.0
    return found_NM
