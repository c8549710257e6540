"""PDTrim's iterative block removal in the manner of simulated annealing (arXiv:2509.04467).

From the paper: removal sets of a fixed size, one block exchanged at a time, worse sets accepted
with a probability that falls as the search goes on, and **each stage by itself**. Everything below
is a project default, since the paper's settings are not public:

- The start is the most redundant set by block influence.
- A generation proposes several neighbours that were not scored before, the best of them is the
  move: evaluators work in parallel, and their number does not change the search.
- Scores of different models differ by orders of magnitude, so a move is judged by its relative
  loss, at a temperature that falls geometrically from ``HOTTEST`` to ``COLDEST``.
- The stages are coupled at the end: decode alone, prefill alone (without kv modes: inside decode's
  best set, which is PDTrim's subset rule), then both together from the union of the two best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayapp.plan import STAGES, Stage
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.methods.method import Generation, Setup
from rayapp.pruning.methods.similarity import most_redundant

EVALUATIONS = 256
HOTTEST, COLDEST = 0.5, 0.01
STAGE_SHARE = 0.25
"""Share of all evaluations that every stage by itself gets at most; the coupled phase gets the
rest."""

_DRAWS = 64  # attempts to draw a candidate that was not scored before, once all neighbours were


@dataclass(frozen=True)
class _Phase:
    """One phase of annealing: over ``space``, exchanging units of ``stages`` only."""

    name: str
    space: Space
    stages: tuple[Stage, ...] = STAGES


class Annealing:
    """Simulated annealing, first stage by stage and then coupled."""

    uses_influence = True

    def __init__(self, setup: Setup) -> None:
        assert setup.influence is not None, "annealing starts from the measured influence"
        self._setup = setup
        self._influence = setup.influence
        self._total = self._left = setup.evaluations or EVALUATIONS
        self._phases = _phases(setup.space)
        self._seen: dict[Candidate, float] = {}
        self._best: dict[str, Candidate] = {}
        self._generation = 0
        self._asked: tuple[Candidate, ...] = ()
        self._current: tuple[float, Candidate] | None = None
        self._phase_best: tuple[float, Candidate] | None = None
        self._enter_phase()

    def ask(self) -> Generation | None:
        """Propose neighbours of the current candidate; a spent phase gives way to the next one."""
        while self._phases:
            self._asked = self._propose()
            if self._asked:
                return Generation(self._asked, self._phases[0].name)
            self._phases = self._phases[1:]
            self._enter_phase()
        return None

    def tell(self, scores: Sequence[float]) -> None:
        """Take the best proposal as the move; accept it, or stay."""
        ranked = sorted(zip(scores, self._asked, strict=True))
        self._seen.update({candidate: score for score, candidate in ranked})
        self._left -= len(ranked)
        self._spent += len(ranked)
        move = ranked[0]
        if self._accepts(move[0]):
            self._current = move
        self._phase_best = min(move, self._phase_best or move)
        self._best[self._phases[0].name] = self._phase_best[1]
        self._generation += 1

    @property
    def evaluations_left(self) -> int:
        """Most evaluations that all phases together may still use."""
        return self._left if self._phases else 0

    def _enter_phase(self) -> None:
        self._spent = 0
        self._current = None
        if self._phases:
            last = len(self._phases) == 1
            self._allowance = self._left if last else int(self._total * STAGE_SHARE)
            self._start = self._start_of(self._phases[0])
            if self._start in self._seen:
                self._current = (self._seen[self._start], self._start)
        self._phase_best = self._current

    def _start_of(self, phase: _Phase) -> Candidate:
        """The start of a phase: the best sets of earlier phases, else the most redundant units."""
        best_decode = self._best.get("decode")
        decode = None
        if best_decode and phase.space.count("decode"):
            decode = phase.space.units(best_decode)[1]
        start = most_redundant(phase.space, self._influence, decode=decode)
        if phase.name == "joint" and "prefill" in self._best:
            start = replace(start, prefill=self._best["prefill"].prefill)
        return start

    def _propose(self) -> tuple[Candidate, ...]:
        """The start (first in its phase) and random neighbours that were not scored before."""
        phase = self._phases[0]
        room = min(self._setup.generation_size, self._allowance - self._spent)
        around = self._current[1] if self._current else self._start
        proposals: list[Candidate] = [] if self._current else [self._start][:room]
        unseen = [c for c in phase.space.swaps(around, phase.stages) if c not in self._seen]
        count = min(room - len(proposals), len(unseen))
        proposals += self._setup.rng(self._generation, 0).sample(unseen, count)
        if room and not proposals:
            proposals = self._jump(phase)
        return tuple(sorted(proposals))

    def _jump(self, phase: _Phase) -> list[Candidate]:
        """A candidate from anywhere that was not seen yet, once all neighbours were."""
        draws = range(1, 1 + _DRAWS) if phase.stages == STAGES else range(0)
        drawn = (phase.space.draw(self._setup.rng(self._generation, index)) for index in draws)
        return [c for c in drawn if c not in self._seen][:1]

    def _accepts(self, score: float) -> bool:
        if self._current is None or score <= self._current[0]:
            return True
        progress = min(1.0, self._spent / self._allowance)
        temperature = HOTTEST * (COLDEST / HOTTEST) ** progress
        loss = (score - self._current[0]) / max(abs(self._current[0]), 1e-12)
        return self._setup.rng(self._generation, -1).random() < math.exp(-loss / temperature)


def _phases(space: Space) -> tuple[_Phase, ...]:
    if not space.count("prefill"):
        return (_Phase("decode", space),)
    if not space.count("decode"):
        return (_Phase("prefill", space),)
    decode = _Phase("decode", replace(space, prefill_remove=0))
    if space.kv_modes:
        prefill = _Phase("prefill", replace(space, decode_remove=0))
    else:
        prefill = _Phase("prefill", space, ("prefill",))
    return (decode, prefill, _Phase("joint", space))
