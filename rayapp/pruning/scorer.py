"""``score_many``: turns candidates and chunks into scores, wherever they are computed.

The memo, the split into work and the sums are here, once; the compute behind them is in this
process or on evaluator actors (:mod:`rayapp.distributed.evaluator_pool`). The unit that is
computed, remembered and sent is one candidate on one chunk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.healing import (
    NO_HEALING,
    HealedUnit,
    Healing,
    Unit,
    unit_order,
)
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator, LineSums
from rayapp.pruning.evaluator.objective import Score, combine
from rayapp.pruning.healing.healed_units import HealedUnits, OnUnit
from rayapp.pruning.healing.training import Healer
from rayapp.pruning.settings.objective import Objective

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Work:
    """Neighbouring candidates (ascending) on one chunk, and their healing."""

    chunk: int
    candidates: tuple[Candidate, ...]
    healing: Healing = NO_HEALING

    @property
    def units(self) -> frozenset[Unit]:
        """The units that must have been added before."""
        return frozenset(unit for c in self.candidates for unit in self.healing.units(c))


@dataclass(frozen=True)
class Done:
    """The sums of one piece of work, candidate by candidate, and the seconds that it took."""

    work: Work
    sums: tuple[LineSums, ...]
    seconds: float


class Compute(Protocol):
    """The place where candidates are computed: this process, or evaluators of a cluster."""

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        """Compute every piece of work once; results come in any order, as they finish."""
        ...

    def heal(self, units: Sequence[Unit]) -> Iterator[HealedUnit]:
        """Train every unit once; they come in any order, as they finish."""
        ...

    def add_healed(self, healed: HealedUnit) -> None:
        """Make a trained unit known to the evaluators of candidates that use it."""
        ...

    def measure(
        self, function: Callable[..., Measured], *arguments: object, units: Collection[Unit] = ()
    ) -> Measured:
        """The result of ``function(evaluator, *arguments)`` on any one of the evaluators.

        Args:
            function: A function of a module, so that it can be named to another process.
            arguments: The function's arguments beside the evaluator.
            units: Trained units that the function needs; they have been added before.
        """
        ...

    @property
    def num_evaluators(self) -> int:
        """Number of evaluators that compute at the moment."""
        ...


class LocalCompute:
    """One evaluator in this process, and a trainer of units, if any are to be trained."""

    num_evaluators = 1

    def __init__(self, evaluator: Evaluator, healer: Healer | None = None) -> None:
        self._evaluator = evaluator
        self._healer = healer

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        """Compute one piece after the other, in order."""
        for piece in work:
            yield compute_one(self._evaluator, piece)

    def heal(self, units: Sequence[Unit]) -> Iterator[HealedUnit]:
        """Train one unit after the other, in order."""
        assert self._healer is not None, "a search that heals brings its data"
        for unit in units:
            yield self._healer.heal(unit)

    def add_healed(self, healed: HealedUnit) -> None:
        """Make a trained unit known to the one evaluator."""
        self._evaluator.add_healed(healed)

    def measure(
        self, function: Callable[..., Measured], *arguments: object, units: Collection[Unit] = ()
    ) -> Measured:
        """Measure on the one evaluator, which knows every unit that was added."""
        return function(self._evaluator, *arguments)


def compute_one(evaluator: Evaluator, work: Work) -> Done:
    """Compute one piece of work on an evaluator."""
    started = time.perf_counter()
    sums = tuple(evaluator.line_sums(work.candidates, work.chunk, work.healing))
    return Done(work, sums, time.perf_counter() - started)


def split_work(
    candidates: Mapping[int, Sequence[Candidate]],
    num_evaluators: int,
    healing: Healing = NO_HEALING,
) -> list[Work]:
    """Split candidates (ascending) into pieces of work: chunk by chunk, neighbours together.

    There are enough pieces that no evaluator idles long, and no more, since neighbours share
    states.
    """
    num_groups = math.ceil(4 * num_evaluators / max(1, len(candidates)))
    work = []
    for chunk, waiting in candidates.items():
        size = max(1, math.ceil(len(waiting) / num_groups))
        work += [
            Work(chunk, tuple(waiting[start : start + size]), healing)
            for start in range(0, len(waiting), size)
        ]
    return work


class Scorer:
    """Scores candidates, and remembers the score of every (candidate, chunk).

    Args:
        calibration: The calibration set, whose lines are scored.
        objective: The objective of the scores.
        compute: The compute that scores come from.
        weights: Fingerprint of the weights, as part of the memo's key.
        healed: Trained units, for searches that heal.

    Attributes:
        healing: How candidates are healed before they are scored.
    """

    def __init__(
        self,
        calibration: Calibration,
        objective: Objective,
        compute: Compute,
        *,
        weights: str,
        healed: HealedUnits | None = None,
    ) -> None:
        self.calibration = calibration
        self.objective = objective
        self.compute = compute
        rules = tuple(sorted((b, r.model_dump_json()) for b, r in objective.kv_transfer.items()))
        kind = (objective.kind, objective.kl_top_k, objective.first_token_weight)
        self._context = (weights, *kind, objective.first_token, rules)
        self.healed = healed
        self.healing = NO_HEALING
        self._fixed: dict[Unit, str] = {}
        self._memo: dict[tuple[object, ...], tuple[LineSums, float]] = {}

    def heal_with(self, healing: Healing) -> None:
        """Score candidates from now on with the units that they use under ``healing``."""
        assert self.healed is not None, "a search that heals brings its units"
        self.healing = healing

    def heal_as(self, units: Sequence[HealedUnit]) -> None:
        """Score candidates from now on with these units, which belong to a healed plan."""
        for healed in units:
            self.compute.add_healed(healed)
        self._fixed = {healed.unit: healed.weights.digest for healed in units}
        self.healing = Healing(fixed=tuple(sorted(self._fixed, key=unit_order)))

    def heal(self, candidates: Sequence[Candidate], on_unit: OnUnit | None = None) -> None:
        """Train the units that the candidates use, except those that were trained before.

        Raises:
            SearchError: A unit cannot be trained or written.
        """
        if self.healed is not None:
            self.healed.ensure((p for c in candidates for p in self.units(c)), on_unit)

    def units(self, candidate: Candidate) -> tuple[Unit, ...]:
        """The units that a candidate is scored with."""
        return self.healing.units(candidate)

    def score_many(
        self,
        candidates: Sequence[Candidate],
        chunks: Sequence[int] | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[Score]:
        """Scores in the order of ``candidates``; the units that they use are trained first.

        Args:
            candidates: Candidates to score; repeated ones are computed once.
            chunks: Chunks to score on; all by default.
            on_progress: Called with the number of candidates that this call has finished so far,
                fractions included.

        Raises:
            SearchError: A score is not finite.
        """
        chunks = range(len(self.calibration.chunks)) if chunks is None else chunks
        finished = 0.0
        self.heal(candidates)
        for done in self.compute.run(self._missing(candidates, chunks)):
            self._remember(done)
            finished += len(done.work.candidates) / len(chunks)
            if on_progress:
                on_progress(finished)
        return [self._score(candidate, chunks) for candidate in candidates]

    def _missing(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> list[Work]:
        """The pieces of work that the memo has no sums of."""
        unique = sorted(set(candidates))
        missing = {
            chunk: [c for c in unique if self._key(c, chunk) not in self._memo] for chunk in chunks
        }
        return split_work(missing, self.compute.num_evaluators, self.healing)

    def _remember(self, done: Done) -> None:
        share = done.seconds / len(done.work.candidates)
        for candidate, sums in zip(done.work.candidates, done.sums, strict=True):
            self._memo[self._key(candidate, done.work.chunk)] = (sums, share)

    def _score(self, candidate: Candidate, chunks: Sequence[int]) -> Score:
        sums: dict[int, float] = {}
        seconds = 0.0
        for chunk in chunks:
            values, share = self._memo[self._key(candidate, chunk)]
            sums.update(zip(self.calibration.chunks[chunk].lines, values, strict=True))
            seconds += share
        score = combine(self.objective, self.calibration, sums, name=str(candidate))
        return replace(score, seconds=seconds, num_chunks=len(chunks))

    def _key(self, candidate: Candidate, chunk: int) -> tuple[object, ...]:
        digest = self.healed.digest if self.healed else self._fixed.__getitem__
        digests = tuple(digest(unit) for unit in self.units(candidate))
        return (candidate, self.calibration.chunks[chunk].key, digests, *self._context)
