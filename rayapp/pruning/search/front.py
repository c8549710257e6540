"""A front of plans: quality, prefill time, decode time and bytes, none of them worse for nothing.

Every size up to the given ones is searched, with a journal of its own under ``sizes/`` and one memo
of scores for all. Every candidate that was scored on all chunks competes. Times and bytes are the
measured costs of the parts, added up (:mod:`rayapp.pruning.measures.costs`): estimates for
choosing, not results to report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayapp.models.hub import from_directory
from rayapp.plan import PLAN_FILE, STAGES, ModelSignature
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.healing import Healing
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.measures.costs import Costs
from rayapp.pruning.progress import ProgressCallback
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.search.run import SearchResult, run_search
from rayapp.pruning.search.sizes import kept_costs
from rayapp.pruning.search.written_plan import seen_by, write_plan
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.storage import Storage

FRONT_FILE = "front.json"
PRICE = ("prefill_s", "decode_s", "bytes_sent")


@dataclass(frozen=True)
class Point:
    """One candidate and the values that it is judged by; less is better everywhere.

    Attributes:
        candidate: The candidate itself.
        score: Its score on the calibration set.
        prefill_s: Seconds of one prefill of the median prompt.
        decode_s: Seconds of one decode step.
        bytes_sent: Bytes of KV that the median prompt sends.
    """

    candidate: Candidate
    score: float
    prefill_s: float
    decode_s: float
    bytes_sent: int

    @property
    def price(self) -> tuple[float, float, int]:
        """The point's values other than the score."""
        return self.prefill_s, self.decode_s, self.bytes_sent


@dataclass(frozen=True)
class FrontResult:
    """A front of plans, best score first, and the searches that it came from."""

    points: tuple[Point, ...]
    searches: tuple[SearchResult, ...]

    def summary(self, out: str) -> str:
        """The front in one line for people."""
        scored = sum(result.evaluations for result in self.searches)
        seconds = sum(result.seconds for result in self.searches)
        return (
            f"{out}/{FRONT_FILE}: {len(self.points)} plans of {len(self.searches)} sizes, scores "
            f"{self.points[0].score:.5g} to {self.points[-1].score:.5g}, {scored} evaluations in "
            f"{seconds:.1f} s"
        )


def search_front(
    score: ScoreSettings,
    search: SearchSettings,
    scorer: Scorer,
    model: ModelSignature,
    *,
    environment: Mapping[str, Any] | None = None,
    on_progress: ProgressCallback | None = None,
) -> FrontResult:
    """Search every size; write ``front.json`` and ``front/NN/plan.json``, best score first.

    ``search.evaluations`` are shared out evenly over the sizes; None leaves their number to the
    method.

    Raises:
        InputError: A setting is refused as in :func:`rayapp.pruning.search.run.run_search`.
        SearchError: A search fails as it can there.
    """
    storage = Storage(search.out)
    costs = kept_costs(storage, scorer.compute, begun=search.resume)
    searches = [
        run_search(score, settings, scorer, model, environment=environment, on_progress=on_progress)
        for settings in _searches(search)
    ]
    scores = _whole_scores(searches, len(scorer.calibration.chunks))
    points = undominated(_point(c, scores[c], costs, scorer.healing) for c in scores)
    _write(storage, score, search, model, points, scores, scorer)
    return FrontResult(tuple(points), tuple(searches))


def _searches(settings: SearchSettings) -> list[SearchSettings]:
    """The settings of the searches, one per size."""
    sizes = settings.sizes()
    share = settings.evaluations and max(1, settings.evaluations // len(sizes))
    return [
        settings.model_copy(
            update={
                "out": f"{settings.out}/sizes/prefill-{prefill:g}-decode-{decode:g}",
                "prefill_remove": prefill,
                "decode_remove": decode,
                "evaluations": share,
            }
        )
        for prefill, decode in sizes
    ]


def _whole_scores(searches: Sequence[SearchResult], num_chunks: int) -> dict[Candidate, Score]:
    return {
        trial.candidate: trial.score
        for result in searches
        for trial in result.trials
        if trial.score.num_chunks == num_chunks
    }


def _point(candidate: Candidate, score: Score, costs: Costs, healing: Healing) -> Point:
    prefill, decode = (healing.num_bridges(candidate, stage) for stage in STAGES)
    return Point(
        candidate,
        score.value,
        costs.prefill_s(candidate, prefill),
        costs.decode_s(candidate, decode),
        costs.bytes_sent(candidate),
    )


def undominated(points: Iterable[Point]) -> list[Point]:
    """Points that no other beats in one respect and equals in the rest; best score first.

    Of points with equal values, the smaller candidate stays.
    """
    best: dict[tuple[float, float, int], Point] = {}
    for point in sorted(points, key=lambda p: (p.score, p.price, p.candidate)):
        best.setdefault(point.price, point)
    front: list[Point] = []
    for point in best.values():  # points come by score, so only earlier ones can beat it
        if not any(_is_cheaper(other, point) for other in front):
            front.append(point)
    return front


def _is_cheaper(other: Point, point: Point) -> bool:
    return all(mine <= its for mine, its in zip(other.price, point.price, strict=True))


def _write(
    storage: Storage,
    score: ScoreSettings,
    search: SearchSettings,
    model: ModelSignature,
    points: Sequence[Point],
    scores: Mapping[Candidate, Score],
    scorer: Scorer,
) -> None:
    """Write the plans first and their list last, so that the list names no missing plan."""
    rows: list[dict[str, Any]] = []
    seen = seen_by(score, search)
    for number, point in enumerate(points):
        directory = f"front/{number:02d}"
        plan = point.candidate.plan(
            model,
            first_token=score.first_token,
            kv_transfer=score.kv_transfer,
            visual_tokens=score.visual_tokens,
            provenance={
                **from_directory(score.model).provenance,
                "settings": {**search.identity, **score.identity},
                "seen": seen,
                "score": point.score,
                "score_by_task": scores[point.candidate].tasks,
                "estimated": dict(zip(PRICE, point.price, strict=True)),
            },
        )
        write_plan(Storage(f"{storage.location}/{directory}"), plan, point.candidate, scorer)
        removed: dict[str, Any] = {stage: point.candidate.labels(stage) for stage in STAGES}
        values = {"score": point.score, **dict(zip(PRICE, point.price, strict=True))}
        rows.append({"plan": f"{directory}/{PLAN_FILE}", **removed, **values})
    storage.write_bytes(FRONT_FILE, (json.dumps(rows, indent=1) + "\n").encode())
