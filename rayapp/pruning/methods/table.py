"""The search methods by name."""

from __future__ import annotations

from typing import Protocol

from rayapp.pruning.methods.annealing import Annealing
from rayapp.pruning.methods.cbo import Cbo
from rayapp.pruning.methods.evolution import Evolution
from rayapp.pruning.methods.exhaustive import Exhaustive
from rayapp.pruning.methods.greedy import Greedy
from rayapp.pruning.methods.method import SearchMethod, Setup
from rayapp.pruning.methods.one_shot import OneShot
from rayapp.pruning.methods.random_sets import Uniform
from rayapp.pruning.methods.similarity import Similarity
from rayapp.pruning.methods.surrogate import Surrogate
from rayapp.pruning.methods.window import Window


class MethodKind(Protocol):
    """An entry of the table: a class that makes a method from a setup."""

    uses_influence: bool

    def __call__(self, setup: Setup) -> SearchMethod:
        """Make a method at its start."""
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
"""The methods by name. Adding one is one file and one line here; a method says whether it
``uses_influence``."""

GRADIENT_METHODS = frozenset({"cbo"})
"""Names of the methods that start from the measured Hessian in the gates."""
