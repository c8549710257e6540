"""SLEB's greedy removal (arXiv:2402.09025): one unit at a time, every step tries every unit.

Project defaults: both stages grow together, so a step tries every further unit of either stage and
keeps the one removal that scores best, until both sizes are met; without kv modes prefill gives up
only units that decode has already given up. Where the allowed evaluations end first, the rest
follows the scores of single units, and the last evaluation is the finished candidate's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rayapp.plan import STAGES
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.space import Space, Units
from rayapp.pruning.methods.method import Generation, Setup


class Greedy:
    """Grows one candidate from the dense model."""

    uses_influence = False

    def __init__(self, setup: Setup) -> None:
        self._space = setup.space
        self._allowed = math.inf if setup.evaluations is None else setup.evaluations
        self._current = DENSE
        self._singles: dict[Candidate, float] = {}
        self._asked: tuple[Candidate, ...] = ()

    def ask(self) -> Generation | None:
        """Every candidate with one more unit removed."""
        missing = _missing(self._space, self._current)
        if not missing or not self._allowed:
            return None
        room = self._allowed - (missing > 1)  # the last evaluation is the finished candidate's
        extended = self._ranked()
        fitting = extended[: int(min(room, len(extended)))]
        self._asked = tuple(sorted(fitting)) if fitting else (self._completed(),)
        return Generation(self._asked, f"greedy {len(self._current_units()) + 1}")

    def tell(self, scores: Sequence[float]) -> None:
        """Keep the best removal."""
        scored = list(zip(scores, self._asked, strict=True))
        if self._current == DENSE:
            self._singles = {candidate: score for score, candidate in scored}
        self._current = min(scored)[1]
        self._allowed -= len(scored)

    @property
    def evaluations_left(self) -> int:
        """Upper bound, as if every step had as many choices as the next one."""
        steps = _missing(self._space, self._current)
        return int(
            min(self._allowed, steps * len(extensions(self._space, self._current, every=True)))
        )

    def _current_units(self) -> tuple[int, ...]:
        return tuple(unit for units in self._space.units(self._current) for unit in units)

    def _ranked(self) -> list[Candidate]:
        """Extensions of the current candidate; those by the best single units come first."""
        return sorted(extensions(self._space, self._current), key=self._rank_from(self._current))

    def _rank_from(self, before: Candidate) -> Callable[[Candidate], tuple[float, Candidate]]:
        """A sort key for extensions of a candidate: the score of the added unit alone."""

        def rank(extended: Candidate) -> tuple[float, Candidate]:
            added = Candidate(
                tuple(part for part in extended.prefill if part not in before.prefill),
                tuple(part for part in extended.decode if part not in before.decode),
            )
            return self._singles.get(added, math.inf), extended

        return rank

    def _completed(self) -> Candidate:
        candidate = self._current
        while _missing(self._space, candidate):
            candidate = min(extensions(self._space, candidate), key=self._rank_from(candidate))
        return candidate


def extensions(space: Space, candidate: Candidate, *, every: bool = False) -> list[Candidate]:
    """Candidates that remove one unit more of one stage, up to the sizes of ``space``.

    They can still grow into candidates of the space; with ``every``, others are listed too.
    """
    prefill, decode = space.units(candidate)
    candidates: list[Candidate] = []
    if len(prefill) < space.count("prefill"):
        pool = [u for u in space.pool("prefill") if every or space.kv_modes or u in decode]
        candidates += [space.candidate((*prefill, u), decode) for u in pool if u not in prefill]
    if len(decode) < space.count("decode"):
        grown = [(*decode, u) for u in space.pool("decode") if u not in decode]
        candidates += [
            space.candidate(prefill, d) for d in grown if every or _holds_prefill(space, d)
        ]
    return candidates


def _holds_prefill(space: Space, decode: Units) -> bool:
    """Whether prefill can choose all its units among decode's, once decode is complete."""
    shared = len({*decode} & {*space.pool("prefill")})
    room = space.count("decode") - len(decode)
    return space.kv_modes or shared + room >= space.count("prefill")


def _missing(space: Space, candidate: Candidate) -> int:
    """Number of units that are still to be removed."""
    units = space.units(candidate)
    return sum(space.count(s) - len(u) for s, u in zip(STAGES, units, strict=True))
