"""One seed: a search with and without races, and the cost of naive scoring beside it."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lines.equal import equal_lines
from transformers import PreTrainedModel

from cost.meter import Cost, Meter, Recording
from rayapp.models.loading import LoadedModel
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.search.run import SearchResult, run_search
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings


def score_of(arguments: argparse.Namespace) -> ScoreSettings:
    return ScoreSettings(model=str(arguments.model), calibration="benchmark", dtype="float32")


def search_of(
    arguments: argparse.Namespace, out: str, seed: int, *, racing: bool
) -> SearchSettings:
    return SearchSettings.checked(
        out=out,
        prefill_remove=arguments.remove,
        decode_remove=arguments.remove,
        method=arguments.method,
        evaluations=arguments.evaluations,
        seed=seed,
        racing=racing,
    )


def search(
    arguments: argparse.Namespace,
    model: LoadedModel,
    lines: Calibration,
    seed: int,
    *,
    racing: bool,
) -> tuple[SearchResult, Recording]:
    """One search, alone on a fresh evaluator."""
    compute = Recording(Evaluator(model.model, lines, Objective()))
    scorer = Scorer(lines, Objective(), compute, weights="benchmark")
    with tempfile.TemporaryDirectory() as out:
        wanted = search_of(arguments, out, seed, racing=racing)
        return run_search(score_of(arguments), wanted, scorer, model.signature), compute


def naive(
    model: PreTrainedModel, lines: Calibration, candidates: Sequence[Candidate]
) -> tuple[Cost, list[list[float]]]:
    """Score every candidate from scratch; the dense reference, once per chunk, is not counted."""
    evaluator = Evaluator(model, lines, Objective(), cache_bytes=0)
    meter, reference = Meter(evaluator), Meter(evaluator)
    sums: list[list[float]] = [[] for _ in candidates]
    for chunk in range(len(lines.chunks)):
        with reference:
            evaluator.line_sums([], chunk)
        with meter:
            line_sums = evaluator.line_sums(candidates, chunk)
        for row, values in zip(sums, line_sums, strict=True):
            row += values
    return meter.cost - reference.cost, sums


def trial(
    arguments: argparse.Namespace, model: LoadedModel, seed: int
) -> tuple[dict[str, Any], tuple[Candidate, Candidate]]:
    """One row of the table, and the two plans: without racing, with."""
    lines = equal_lines(model.tokenizer, arguments, "calibration", arguments.lines, seed)
    whole, compute = search(arguments, model, lines, seed, racing=False)
    raced, racing = search(arguments, model, lines, seed, racing=True)
    candidates = sorted({trial.candidate for trial in whole.trials})
    cost, sums = naive(model.model, lines, candidates)
    _check_equal(whole, dict(zip(candidates, map(math.fsum, sums), strict=True)))
    row = {
        "seed": seed,
        "evaluations": whole.evaluations,
        "naive": asdict(cost),
        "search": asdict(compute.meter.cost),
        "racing": asdict(racing.meter.cost),
        "naive/search": cost.over(compute.meter.cost),
        "naive/racing": cost.over(racing.meter.cost),
        "score": {"search": whole.score.value, "racing": raced.score.value},
    }
    return row, (Candidate.from_plan(whole.plan), Candidate.from_plan(raced.plan))


def _check_equal(whole: SearchResult, naive_sums: dict[Candidate, float]) -> None:
    """Check that reuse changed no score."""
    for each in whole.trials:
        ours, theirs = math.fsum(each.score.lines), naive_sums[each.candidate]
        limit = 1e-5 * abs(theirs) + 1e-7 * len(each.score.lines)
        assert abs(ours - theirs) <= limit, (each.candidate, ours, theirs)
