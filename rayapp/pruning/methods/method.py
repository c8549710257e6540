"""What a search method is: it asks for candidates by the generation, and is told scores."""

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
    """What a method starts from.

    Attributes:
        space: The candidates that the search chooses from.
        evaluations: Candidates that may be scored at most; None leaves it to the method.
        generation_size: Candidates asked at a time. It is fixed, whatever the number of workers, so
            that their number never changes a search.
        seed: Seed of all randomness.
        influence: Measured on the dense model where the method uses it.
        gate_hessian: Likewise.
    """

    space: Space
    evaluations: int | None
    generation_size: int
    seed: int
    influence: Influence | None = None
    gate_hessian: GateHessian | None = None

    def rng(self, generation: int, index: int) -> random.Random:
        """Randomness of one draw."""
        return random.Random(f"{self.seed}/{generation}/{index}")


@dataclass(frozen=True)
class Generation:
    """Candidates that are scored together, and told in this order; ``phase`` is for people."""

    candidates: tuple[Candidate, ...]
    phase: str


class SearchMethod(Protocol):
    """The interface of all methods."""

    def ask(self) -> Generation | None:
        """The next candidates; None when the search is over. Every ask is followed by a tell."""
        ...

    def tell(self, scores: Sequence[float]) -> None:
        """Scores of the candidates that were asked, lower is better."""
        ...

    @property
    def evaluations_left(self) -> int:
        """Candidates that are still to be scored, at most; those that were asked included."""
        ...
