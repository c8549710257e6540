"""A search method replayed on a table of scores."""

from __future__ import annotations

from dataclasses import dataclass

from exhaustive.scores import ScoreTable
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.measures.gate_hessian import measuring_cost
from rayapp.pruning.methods.method import SearchMethod, Setup
from rayapp.pruning.methods.table import GRADIENT_METHODS, METHODS

GENERATION_SIZE = 8


@dataclass(frozen=True)
class Found:
    """The outcome of one method in one trial: its best candidate, error and cost."""

    best: Candidate
    error: float
    evaluations: int


def told_to(search: SearchMethod, table: ScoreTable) -> dict[Candidate, float]:
    """All candidates of a search with their scores, in the order in which it is told them."""
    told: dict[Candidate, float] = {}
    while (asked := search.ask()) is not None:
        scores = table.lookup(asked.candidates)
        told.update(zip(asked.candidates, scores, strict=True))
        search.tell(scores)
    return told


def replay(
    table: ScoreTable, space: Space, method: str, evaluations: int | None, seed: int
) -> Found:
    """Run a method on a space whose scores the table holds.

    Args:
        table: The scores, and the measures that methods use.
        space: The space that is searched.
        method: A name of :data:`METHODS`.
        evaluations: The budget, measures included; None leaves it to the method.
        seed: Seed of the search.
    """
    kind = METHODS[method]
    measuring = kind.uses_influence + (measuring_cost() if method in GRADIENT_METHODS else 0)
    if evaluations is not None:
        evaluations -= measuring
    search = kind(
        Setup(space, evaluations, GENERATION_SIZE, seed, table.influence, table.gate_hessian)
    )
    told = told_to(search, table)
    score, best = min((score, candidate) for candidate, score in told.items() if candidate in space)
    optimum = min(table.scores[candidate] for candidate in space)
    return Found(best, score / optimum - 1, len(told) + measuring)
