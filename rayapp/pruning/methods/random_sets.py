"""Candidates drawn uniformly over the space, none twice: the baseline of all other methods."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.methods.method import Generation, Setup

EVALUATIONS = 256
"""Number of candidates scored if ``--evaluations`` is not given (project default)."""


class Uniform:
    """Asks for random candidates until its evaluations, or the space, are spent."""

    uses_influence = False

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._left = min(setup.evaluations or EVALUATIONS, setup.space.size)
        self._seen: set[Candidate] = set()
        self._generation = 0

    def ask(self) -> Generation | None:
        """Candidates that were not drawn before."""
        if not self._left:
            return None
        drawn: set[Candidate] = set()
        for index in itertools.count():  # ends: unseen candidates exist, and any can be drawn
            candidate = self._setup.space.draw(self._setup.rng(self._generation, index))
            if candidate not in self._seen:
                drawn.add(candidate)
            if len(drawn) == min(self._setup.generation_size, self._left):
                break
        self._seen |= drawn
        return Generation(tuple(sorted(drawn)), "random")

    def tell(self, scores: Sequence[float]) -> None:
        """Learn nothing: draws are independent."""
        self._left -= len(scores)
        self._generation += 1

    @property
    def evaluations_left(self) -> int:
        """Evaluations that are still allowed; never more than the space has candidates."""
        return self._left
