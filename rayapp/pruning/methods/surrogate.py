"""A model of block interactions, fitted to real scores, proposes; real scores decide.

The method follows CBO (arXiv:2602.00161), which solves a quadratic model from gradients at a fixed
number of removed blocks. Ours covers two coupled stages and parts, and is fitted to measured scores
in place of gradients, which extrapolate badly from "all there" to "removed". Everything is a
project default:

1. Singles: every unit is removed alone from each stage that removes any, beside the dense model.
2. Generation by generation, the quadratic model (:mod:`rayapp.pruning.methods.quadratic`) is fitted
   to all scores so far, and its best candidates that were not scored yet are verified.

The first generation of step 2 is thus the one-shot ranking, and every later one corrects it.
Scoring pairs between the two steps did not pay, since verified candidates say as much about their
pairs. The search on the model costs no score and knows the coupling rule. Without ``--evaluations``
the number of evaluations grows with the square root of the space's size (``PER_ROOT``); at least a
generation and at most ``MAX_VERIFIED`` candidates are verified. If the allowed evaluations do not
pay for step 1 and one generation more, random candidates replace the singles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.methods.landscape import Landscape
from rayapp.pruning.methods.method import Generation, Setup
from rayapp.pruning.methods.quadratic import Quadratic, root_losses, singles

PER_ROOT = 3.2
"""Evaluations per square root of the space's size: 39 % of the pairs of 12 blocks, 15 % of the sets
of four, 5 % of a pair in each stage."""

MAX_VERIFIED = 256
"""Most candidates that are verified if the user gives no number."""

KNOWN_STARTS = 4
"""Number of the best verified candidates that start a search on the model, in spaces too large to
list."""


class Surrogate:
    """Probes single units, then verifies its model's favourites until the evaluations are spent."""

    uses_influence = False

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._landscape = Landscape(setup.space)
        self._told: dict[Candidate, float] = {}
        self._generation = 0
        probes = [DENSE, *singles(setup.space)]
        allowed = setup.evaluations or _evaluations(setup, len(probes))
        self._probes = probes if allowed >= len(probes) + setup.generation_size else []
        outside = sum(probe not in setup.space for probe in self._probes)
        self._left = min(allowed, outside + setup.space.size)
        self._asked: tuple[Candidate, ...] = ()

    def ask(self) -> Generation | None:
        """Probes first, then the model's best candidates without a score."""
        room = min(self._left, self._setup.generation_size)
        if not room:
            return None
        done = len(self._told)
        if done < len(self._probes):
            self._asked = tuple(self._probes[done : done + room])
            return Generation(self._asked, "singles")
        self._asked = tuple(sorted(self._proposals(room)))
        if not self._asked:
            self._left = 0
            return None
        return Generation(self._asked, "surrogate")

    def tell(self, scores: Sequence[float]) -> None:
        """Remember the scores for the next fit."""
        self._told.update(zip(self._asked, scores, strict=True))
        self._left -= len(scores)
        self._generation += 1

    @property
    def evaluations_left(self) -> int:
        """Evaluations that are still allowed; never more than probes and space have candidates."""
        return self._left

    def _proposals(self, count: int) -> list[Candidate]:
        space = self._setup.space
        if not self._told:
            draws = (space.draw(self._setup.rng(0, index)) for index in range(8 * count))
            return list(dict.fromkeys(draws))[:count]
        known = sorted((s, c) for c, s in self._told.items() if c in space)[:KNOWN_STARTS]
        return self._landscape.lowest(
            self._model(),
            count,
            rng=lambda index: self._setup.rng(self._generation, index),
            excluded=self._told,
            starts=[candidate for _, candidate in known],
        )

    def _model(self) -> Quadratic:
        """A model fitted to all scores so far."""
        candidates = list(self._told)
        scores_N = np.array([self._told[candidate] for candidate in candidates])
        targets_N = root_losses(scores_N, self._told.get(DENSE, 0.0))
        return Quadratic.fitted(self._landscape.features(candidates), targets_N)


def _evaluations(setup: Setup, num_probes: int) -> int:
    """Number of evaluations if the user gives none."""
    wanted = math.ceil(PER_ROOT * math.sqrt(setup.space.size))
    return num_probes + min(MAX_VERIFIED, max(setup.generation_size, wanted - num_probes))
