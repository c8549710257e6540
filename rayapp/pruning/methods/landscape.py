"""The candidates of a space that a model of their scores likes best: no candidate is scored here.

A space of up to ``ENUMERATED`` candidates is looked at as a whole. In a larger one, swaps descend
from the best known sets and from random ones, and all candidates met on the way are ranked. Either
way only candidates of the space come out, so the coupling rule always holds. Predictions are
compared rounded, so that the last bits of a linear algebra library decide nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from functools import cached_property

from rayapp.plan import STAGES
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.methods.quadratic import Array, Quadratic, features

ENUMERATED = 20_000
"""Candidates that are looked at one by one (project default)."""

RESTARTS = 4
"""Random sets that a descent starts from (project default)."""

_DECIMALS = 9


class Landscape:
    """One space as models of its scores see it."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.num_variables = len(STAGES) * space.num_units

    def features(self, candidates: Sequence[Candidate]) -> Array:
        """A row per candidate with a 1 for every unit that it removes."""
        return features(self._space, candidates)

    def lowest(
        self,
        model: Quadratic,
        count: int,
        *,
        rng: Callable[[int], random.Random],
        excluded: Collection[Candidate] = (),
        starts: Sequence[Candidate] = (),
    ) -> list[Candidate]:
        """The ``count`` lowest predictions, lowest first; equal ones ascending.

        Args:
            model: Predicts scores.
            count: Number of candidates wanted; the result has fewer if the space does.
            rng: The random generator of a restart, by its number, in spaces too large to enumerate.
            excluded: Candidates that must not come back.
            starts: Candidates of the space to descend from, beside random ones.
        """
        if self._space.size <= ENUMERATED:
            candidates, features_NM = self._all
            predicted = dict(zip(candidates, _rounded(model, features_NM), strict=True))
        else:
            drawn = [self._space.draw(rng(index)) for index in range(RESTARTS)]
            predicted = self._descents(model, dict.fromkeys([*starts, *drawn]))
        left = (candidate for candidate in predicted if candidate not in excluded)
        return sorted(left, key=lambda candidate: (predicted[candidate], candidate))[:count]

    @cached_property
    def _all(self) -> tuple[list[Candidate], Array]:
        candidates = list(self._space)
        return candidates, self.features(candidates)

    def _descents(self, model: Quadratic, starts: Collection[Candidate]) -> dict[Candidate, float]:
        """Predictions of all candidates met on the way down by best swaps."""
        met = dict(zip(starts, _rounded(model, self.features(list(starts))), strict=True))
        left_from: set[Candidate] = set()
        for start in starts:
            current = start
            while current not in left_from:
                left_from.add(current)
                swapped = self._space.swaps(current)
                new = [candidate for candidate in swapped if candidate not in met]
                met.update(zip(new, _rounded(model, self.features(new)), strict=True))
                current = min([current, *swapped], key=lambda c: (met[c], c))
        return met


def _rounded(model: Quadratic, features_NM: Array) -> list[float]:
    predicted: list[float] = model.predict(features_NM).round(_DECIMALS).tolist()
    return predicted
