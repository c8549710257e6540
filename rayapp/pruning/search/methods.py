"""The search methods by name."""

from __future__ import annotations

from typing import Protocol

from rayapp.pruning.search.annealing import Annealing
from rayapp.pruning.search.cbo import Cbo
from rayapp.pruning.search.evolution import Evolution
from rayapp.pruning.search.exhaustive import Exhaustive
from rayapp.pruning.search.greedy import Greedy
from rayapp.pruning.search.method import SearchMethod, Setup
from rayapp.pruning.search.one_shot import OneShot
from rayapp.pruning.search.similarity import Similarity
from rayapp.pruning.search.surrogate import Surrogate
from rayapp.pruning.search.uniform import Uniform
from rayapp.pruning.search.window import Window


class MethodKind(Protocol):
    """What the table holds: a class that makes a method of a setup."""

    uses_influence: bool

    def __call__(self, setup: Setup) -> SearchMethod:
        """A method at its start."""
        ...


METHODS: dict[str, MethodKind] = {
    "annealing": Annealing,
    "cbo": Cbo,
    "evolution": Evolution,
    "exhaustive": Exhaustive,
    "greedy": Greedy,
    "one_shot": OneShot,
    "random": Uniform,
    "similarity": Similarity,
    "surrogate": Surrogate,
    "window": Window,
}
"""Adding a method is one file and one line here; a method says whether it ``uses_influence``."""

GRADIENT_METHODS = frozenset({"cbo"})
"""Those that start from the measured Hessian in the gates."""
