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
from rayapp.pruning.candidates.healing import NO_HEALING, HealedPair, Healing, Pair
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator, LineSums
from rayapp.pruning.evaluator.objective import Score, combine
from rayapp.pruning.healing.trained_pairs import HealedPairs, OnPair
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
    def pairs(self) -> frozenset[Pair]:
        """The pairs that must have been added before."""
        return frozenset(pair for c in self.candidates for pair in self.healing.pairs(c))


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

    def heal(self, pairs: Sequence[Pair]) -> Iterator[HealedPair]:
        """Train every pair once; they come in any order, as they finish."""
        ...

    def add_healed(self, healed: HealedPair) -> None:
        """Make a trained pair known to the evaluators of candidates that use it."""
        ...

    def measure(
        self, function: Callable[..., Measured], *arguments: object, pairs: Collection[Pair] = ()
    ) -> Measured:
        """The result of ``function(evaluator, *arguments)`` on any one of the evaluators.

        Args:
            function: A function of a module, so that it can be named to another process.
            arguments: The function's arguments beside the evaluator.
            pairs: Trained pairs that the function needs; they have been added before.
        """
        ...

    @property
    def num_evaluators(self) -> int:
        """Number of evaluators that compute at the moment."""
        ...


class LocalCompute:
    """One evaluator in this process, and a trainer of pairs, if any are to be trained."""

    num_evaluators = 1

    def __init__(self, evaluator: Evaluator, healer: Healer | None = None) -> None:
        self._evaluator = evaluator
        self._healer = healer

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        """Compute one piece after the other, in order."""
        for piece in work:
            yield compute_one(self._evaluator, piece)

    def heal(self, pairs: Sequence[Pair]) -> Iterator[HealedPair]:
        """Train one pair after the other, in order."""
        assert self._healer is not None, "a search that heals brings its data"
        for pair in pairs:
            yield self._healer.heal(pair)

    def add_healed(self, healed: HealedPair) -> None:
        """Make a trained pair known to the one evaluator."""
        self._evaluator.add_healed(healed)

    def measure(
        self, function: Callable[..., Measured], *arguments: object, pairs: Collection[Pair] = ()
    ) -> Measured:
        """Measure on the one evaluator, which knows every pair that was added."""
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
        healed: Trained pairs, for searches that heal.

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
        healed: HealedPairs | None = None,
    ) -> None:
        self.calibration = calibration
        self.objective = objective
        self.compute = compute
        rules = tuple(sorted((b, r.model_dump_json()) for b, r in objective.kv_transfer.items()))
        kind = (objective.kind, objective.kl_top_k)
        self._context = (weights, *kind, objective.first_token, rules)
        self.healed = healed
        self.healing = NO_HEALING
        self._fixed: dict[Pair, str] = {}
        self._memo: dict[tuple[object, ...], tuple[LineSums, float]] = {}

    def heal_with(self, healing: Healing) -> None:
        """Score candidates from now on with the pairs that they use under ``healing``."""
        assert self.healed is not None, "a search that heals brings its pairs"
        self.healing = healing

    def heal_as(self, pairs: Sequence[HealedPair]) -> None:
        """Score candidates from now on with these pairs, which belong to a healed plan."""
        for healed in pairs:
            self.compute.add_healed(healed)
        self._fixed = {healed.pair: healed.weights.digest for healed in pairs}
        self.healing = Healing(fixed=tuple(sorted(self._fixed)))

    def heal(self, candidates: Sequence[Candidate], on_pair: OnPair | None = None) -> None:
        """Train the pairs that the candidates use, except those that were trained before.

        Raises:
            SearchError: A pair cannot be trained or written.
        """
        if self.healed is not None:
            self.healed.ensure((p for c in candidates for p in self.pairs(c)), on_pair)

    def pairs(self, candidate: Candidate) -> tuple[Pair, ...]:
        """The pairs that a candidate is scored with."""
        return self.healing.pairs(candidate)

    def score_many(
        self,
        candidates: Sequence[Candidate],
        chunks: Sequence[int] | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[Score]:
        """Scores in the order of ``candidates``; the pairs that they use are trained first.

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
        digests = tuple(digest(pair) for pair in self.pairs(candidate))
        return (candidate, self.calibration.chunks[chunk].key, digests, *self._context)
