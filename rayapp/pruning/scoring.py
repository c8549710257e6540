"""``score_many``: candidates and chunks to scores, whoever computes them.

The memo, the split into work and the sums are here, once; the compute behind them is in this
process or on evaluator actors (:mod:`rayapp.distributed.scoring`). The unit that is computed,
remembered and sent is one candidate on one chunk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rayapp.pruning.calibration import Calibration
from rayapp.pruning.candidates import Candidate
from rayapp.pruning.costs import Costs, measure_costs
from rayapp.pruning.evaluator import Evaluator, LineSums
from rayapp.pruning.objective import Objective, Score, combine
from rayapp.pruning.similarity import Influence, measure_influence


@dataclass(frozen=True)
class Work:
    """Neighbouring candidates (ascending) on one chunk."""

    chunk: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Done:
    """The sums of one piece of work, candidate by candidate, and the seconds that it took."""

    work: Work
    sums: tuple[LineSums, ...]
    seconds: float


class Compute(Protocol):
    """Where candidates are computed."""

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        """Every piece of work once, in any order, as it finishes."""
        ...

    def influence(self) -> Influence:
        """Block and part influence of the dense model."""
        ...

    def costs(self) -> Costs:
        """Seconds and bytes of every part, as one evaluator measures them."""
        ...

    @property
    def num_evaluators(self) -> int:
        """Evaluators that compute at the moment."""
        ...


class LocalCompute:
    """One evaluator in this process."""

    num_evaluators = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        """One piece after the other, in order."""
        for each in work:
            yield compute_one(self._evaluator, each)

    def influence(self) -> Influence:
        """Measured here."""
        return measure_influence(self._evaluator)

    def costs(self) -> Costs:
        """Measured here."""
        return measure_costs(self._evaluator)


def compute_one(evaluator: Evaluator, work: Work) -> Done:
    """Compute one piece of work on an evaluator."""
    started = time.perf_counter()
    sums = tuple(evaluator.line_sums(work.candidates, work.chunk))
    return Done(work, sums, time.perf_counter() - started)


def split_work(candidates: Mapping[int, Sequence[Candidate]], num_evaluators: int) -> list[Work]:
    """Candidates (ascending) by chunk as pieces of work: chunk by chunk, neighbours together.

    Enough pieces that no evaluator idles long, and no more, since neighbours share states.
    """
    num_groups = math.ceil(4 * num_evaluators / max(1, len(candidates)))
    work = []
    for chunk, waiting in candidates.items():
        size = max(1, math.ceil(len(waiting) / num_groups))
        work += [
            Work(chunk, tuple(waiting[start : start + size]))
            for start in range(0, len(waiting), size)
        ]
    return work


class Scorer:
    """Scores candidates, remembering every (candidate, chunk) that was computed.

    Args:
        calibration: The lines.
        objective: What a score is.
        compute: Where it is computed.
        weights: Fingerprint of the weights in use: part of the memo's key.
    """

    def __init__(
        self, calibration: Calibration, objective: Objective, compute: Compute, *, weights: str
    ) -> None:
        self.calibration = calibration
        self.objective = objective
        self.compute = compute
        rules = tuple(sorted((b, r.model_dump_json()) for b, r in objective.kv_transfer.items()))
        kind = (objective.kind, objective.kl_top_k)
        self._context = (weights, *kind, objective.first_token, rules)
        self._memo: dict[tuple[object, ...], tuple[LineSums, float]] = {}

    def score_many(
        self,
        candidates: Sequence[Candidate],
        chunks: Sequence[int] | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[Score]:
        """Scores, in the order of ``candidates``.

        Args:
            candidates: What to score; repeated ones are computed once.
            chunks: Chunks to score on; all by default.
            on_progress: Called with the number of candidates that this call has finished so far,
                fractions included.

        Raises:
            SearchError: A score is not finite.
        """
        chunks = range(len(self.calibration.chunks)) if chunks is None else chunks
        finished = 0.0
        for done in self.compute.run(self._missing(candidates, chunks)):
            self._remember(done)
            finished += len(done.work.candidates) / len(chunks)
            if on_progress:
                on_progress(finished)
        return [self._score(candidate, chunks) for candidate in candidates]

    def _missing(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> list[Work]:
        """What the memo does not hold yet."""
        unique = sorted(set(candidates))
        missing = {
            chunk: [c for c in unique if self._key(c, chunk) not in self._memo] for chunk in chunks
        }
        return split_work(missing, self.compute.num_evaluators)

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
        return (candidate, self.calibration.chunks[chunk].key, *self._context)
