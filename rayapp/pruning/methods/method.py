"""The interface of search methods: they ask for candidates in generations and are told scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.measures.gate_hessian import GateHessian
from rayapp.pruning.measures.influence import Influence


@dataclass(frozen=True)
class Setup:
    """The inputs that a method starts from.

    Attributes:
        space: The candidates that the search chooses from.
        evaluations: Candidates that may be scored at most; None leaves it to the method.
        generation_size: Number of candidates asked for at a time. It is fixed, whatever the number
            of workers, so that their number never changes a search.
        seed: Seed of all randomness.
        influence: The dense model's influence, if the method uses it.
        gate_hessian: The dense model's Hessian in its gates, if the method uses it.
    """

    space: Space
    evaluations: int | None
    generation_size: int
    seed: int
    influence: Influence | None = None
    gate_hessian: GateHessian | None = None

    def rng(self, generation: int, index: int) -> random.Random:
        """A random generator for one draw."""
        return random.Random(f"{self.seed}/{generation}/{index}")


@dataclass(frozen=True)
class Generation:
    """Candidates that are scored together, in this order; ``phase`` is a word for people."""

    candidates: tuple[Candidate, ...]
    phase: str


class SearchMethod(Protocol):
    """The interface of all methods."""

    def ask(self) -> Generation | None:
        """The next candidates; None when the search is over.

        Every ask is followed by a tell.
        """
        ...

    def tell(self, scores: Sequence[float]) -> None:
        """Take the scores of the candidates that were asked for; lower is better."""
        ...

    @property
    def evaluations_left(self) -> int:
        """Most candidates that are still to be scored, including those just asked for."""
        ...
