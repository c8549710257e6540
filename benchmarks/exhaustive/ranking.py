"""The rank order that a model of block interactions gives to a space with known scores.

Shapes: N = candidates of the space, M = units of a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exhaustive.errors import LIMIT
from exhaustive.scores import ScoreTable
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.methods.quadratic import Quadratic, features

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """A model's cost, and its cost until the ranking meets a set within 1 % of the optimum."""

    correlation: float
    unseen_correlation: float
    favourite_error: float
    cost: int
    cost_to_limit: int


@dataclass(frozen=True)
class Truth:
    """A space with all its scores."""

    space: Space
    candidates: list[Candidate]
    features_NM: Array
    scores_N: Array

    @classmethod
    def of(cls, table: ScoreTable, space: Space) -> Truth:
        """Score every candidate that a table has no score of."""
        candidates = list(space)
        scores_N = np.array(table.lookup(candidates))
        return cls(space, candidates, features(space, candidates), scores_N)

    def ranking(
        self,
        model: Quadratic,
        unseen_N: NDArray[np.bool_],
        cost: int,
        told: Sequence[Candidate] = (),
    ) -> Ranking:
        """The ranking of a model that cost so many evaluations, those of ``told`` among them."""
        predicted_N = model.predict(self.features_NM)
        order_N = predicted_N.argsort(kind="stable")
        errors_N = self.scores_N / self.scores_N.min() - 1
        error_of = dict(zip(self.candidates, errors_N, strict=True))
        verified = dict.fromkeys([*told, *(self.candidates[index] for index in order_N)])
        met = next(n for n, c in enumerate(verified, 1) if error_of.get(c, math.inf) <= LIMIT)
        return Ranking(
            spearman(predicted_N, self.scores_N),
            spearman(predicted_N[unseen_N], self.scores_N[unseen_N]),
            float(errors_N[order_N[0]]),
            cost,
            cost - len(told) + met,
        )


def spearman(left_N: Array, right_N: Array) -> float:
    """Spearman's rank correlation."""
    ranks = [values.argsort().argsort() for values in (left_N, right_N)]
    return float(np.corrcoef(*ranks)[0, 1])
