"""Searches of one small model that are counted, cut off and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.preparation import open_evaluator, prepare
from rayapp.pruning.progress import SearchProgress
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.search.run import SearchResult, run_search
from tests.told import Told

SEARCH = {
    "method": "annealing",
    "prefill_remove": 1,
    "decode_remove": 2,
    "evaluations": 20,
    "generation_size": 4,
}


class Counting(LocalCompute):
    """Counts the computed candidates, and stops after ``limit`` of them as a kill would."""

    def __init__(self, evaluator: Evaluator, limit: int | None = None) -> None:
        super().__init__(evaluator)
        self.scored: list[Candidate] = []
        self.limit = limit

    def run(self, work):
        for done in super().run(work):
            self.scored += done.work.candidates
            if self.limit is not None and len(self.scored) > self.limit:
                raise KeyboardInterrupt
            yield done


def run_counted(
    settings: Told,
    limit: int | None = None,
    *,
    evaluator: Evaluator,
    on_progress: Callable[[SearchProgress], None] | None = None,
) -> tuple[SearchResult, Counting]:
    prepared = prepare(*settings)
    compute = Counting(evaluator, limit)
    scorer = Scorer(prepared.calibration, settings.score.scoring(), compute, weights="w")
    found = run_search(
        settings.score,
        settings.search,
        scorer,
        prepared.signature,
        environment=settings.compute.environment,
        on_progress=on_progress,
    )
    return found, compute


def move(settings: Told, out: Path, **changes: Any) -> Told:
    return settings.but(out=str(out), **changes)


def read_journal(out: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "journal.jsonl").read_text().splitlines()]


def reduce_result(result: SearchResult) -> tuple[Any, ...]:
    plan = result.plan.model_copy(update={"provenance": {}})
    return plan, result.score.value, [(t.candidate, t.score.value) for t in result.trials]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, save_tiny, write_calibration) -> Told:
    directory = tmp_path_factory.mktemp("search")
    return Told.of(
        model=str(save_tiny(directory, "llama")),
        calibration=str(write_calibration(directory / "calibration.jsonl")),
        out=str(directory / "undisturbed"),
        **SEARCH,
    )


@pytest.fixture(scope="module")
def evaluator(settings: Told) -> Evaluator:
    """An evaluator with a single chunk, so that a candidate is scored once."""
    calibration = prepare(*settings).calibration
    assert len(calibration.chunks) == 1
    return open_evaluator(settings.score, settings.compute, calibration)


@pytest.fixture(scope="module")
def undisturbed(settings: Told, evaluator: Evaluator) -> SearchResult:
    """The result of an undisturbed search with ``settings``."""
    return run_counted(settings, evaluator=evaluator)[0]


@pytest.fixture(scope="module")
def search(evaluator: Evaluator) -> Callable[..., tuple[SearchResult, Counting]]:
    """A function ``search(settings, limit=..., evaluator=...)``: the result, and computed work."""
    return partial(run_counted, evaluator=evaluator)


@pytest.fixture(scope="session")
def elsewhere() -> Callable[..., Told]:
    """A function ``elsewhere(settings, out, **changes)``: the same search in another directory."""
    return move


@pytest.fixture(scope="session")
def journal() -> Callable[[Path | str], list[dict[str, Any]]]:
    """A function ``journal(out)``: the lines of a journal."""
    return read_journal


@pytest.fixture(scope="session")
def outcome() -> Callable[[SearchResult], tuple[Any, ...]]:
    """A function ``outcome(result)``: everything that an interrupted search shares with a whole
    one.
    """
    return reduce_result
