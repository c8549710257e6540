"""EvoPress's evolutionary search (arXiv:2410.14649): one parent, many offspring, the best lives on.

From the paper: ``STARTS`` random candidates make the first parent; then each generation has
``OFFSPRING`` mutants of the one parent, and the best of parent and offspring is the next parent.
A mutation exchanges one removed unit for one kept unit, ``min(U{1..3}, U{1..3})`` times. With
``k`` of ``n`` units removed the search runs ``k (n - k) / 1.5`` generations.

Project defaults:

- A generation here has the paper's size, whatever ``generation_size`` says.
- Both stages evolve together: ``k (n - k)`` is summed over the stages, and an exchange is drawn
  uniformly over both stages' neighbours, so the coupling rule always holds.
- Nothing is scored twice: offspring that were scored before are drawn again.
- The paper races offspring on growing sets. Here races are a layer under every method
  (:mod:`rayapp.pruning.search.racing`); without one, every candidate is scored on the whole
  calibration set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from rayapp.plan import STAGES, Stage
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space, Units
from rayapp.pruning.methods.method import Generation, Setup

STARTS = 64
OFFSPRING = 32
MAX_EXCHANGES = 3
SWAPS_PER_GENERATION = 1.5

_ATTEMPTS = 16  # number of draws after which no new, allowed candidate is expected


class Evolution:
    """A population of one, and its offspring."""

    uses_influence = False

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        recipe = STARTS + OFFSPRING * num_generations(setup.space)
        self._left = min(setup.evaluations or recipe, setup.space.size)
        self._parent: tuple[float, Candidate] | None = None
        self._seen: set[Candidate] = set()
        self._generation = 0
        self._asked: tuple[Candidate, ...] = ()

    def ask(self) -> Generation | None:
        """The starts, then offspring of the best candidate so far."""
        wanted = min(OFFSPRING if self._parent else STARTS, self._left)
        drawn: set[Candidate] = set()
        for index in range(_ATTEMPTS * wanted):
            candidate = self._draw(index)
            if candidate not in self._seen:
                drawn.add(candidate)
            if len(drawn) == wanted:
                break
        if not drawn:
            self._left = 0
            return None
        self._asked = tuple(sorted(drawn))
        self._seen |= drawn
        return Generation(self._asked, "evolution" if self._parent else "start")

    def tell(self, scores: Sequence[float]) -> None:
        """Make the best of parent and offspring the next parent."""
        best = min(zip(scores, self._asked, strict=True))
        self._parent = min(best, self._parent or best)
        self._left -= len(scores)
        self._generation += 1

    @property
    def evaluations_left(self) -> int:
        """Evaluations left of the recipe's number, or of the allowed one if that is smaller."""
        return self._left

    def _draw(self, index: int) -> Candidate:
        rng = self._setup.rng(self._generation, index)
        if self._parent is None:
            return self._setup.space.draw(rng)
        mutant = self._parent[1]
        for _ in range(min(rng.randint(1, MAX_EXCHANGES), rng.randint(1, MAX_EXCHANGES))):
            mutant = exchanged(self._setup.space, mutant, rng)
        return mutant


def exchanged(space: Space, candidate: Candidate, rng: random.Random) -> Candidate:
    """One neighbour, drawn uniformly over both stages; the candidate itself if it has none.

    Without kv modes, a unit that both stages removed is exchanged in both where decode gives it
    back.
    """
    prefill, decode = space.units(candidate)
    weights = [len(u) * (len(space.pool(s)) - len(u)) for s, u in _stages(prefill, decode)]
    for _ in range(_ATTEMPTS * any(weights)):
        [(stage, units)] = rng.choices(_stages(prefill, decode), weights)
        old = rng.choice(units)
        new = rng.choice([unit for unit in space.pool(stage) if unit not in units])
        both = stage == "decode" and not space.kv_modes
        neighbour = space.candidate(
            _replaced(prefill, old, new) if both or stage == "prefill" else prefill,
            _replaced(decode, old, new) if stage == "decode" else decode,
        )
        if neighbour in space:
            return neighbour
    return candidate


def _stages(prefill: Units, decode: Units) -> list[tuple[Stage, Units]]:
    return [("prefill", prefill), ("decode", decode)]


def _replaced(units: Units, old: int, new: int) -> Units:
    return tuple(new if unit == old else unit for unit in units)


def num_generations(space: Space) -> int:
    """The paper's number of generations, both stages counted."""
    exchanges = sum(space.count(s) * (len(space.pool(s)) - space.count(s)) for s in STAGES)
    return math.ceil(exchanges / SWAPS_PER_GENERATION)
