"""Searches that race: losers see some chunks, winners all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayapp.pruning.preparation import open_evaluator, prepare
from rayapp.pruning.search.run import SearchResult
from tests.told import Told


@pytest.fixture(scope="module")
def raced(tmp_path_factory, settings) -> Told:
    """Settings of a race over six chunks, of which losers see some."""
    out = str(tmp_path_factory.mktemp("raced") / "out")
    changes = {"out": out, "racing": True, "chunk_tokens": 24, "generation_size": 8}
    return settings.but(**changes)


@pytest.fixture(scope="module")
def race(search) -> Callable[..., tuple[SearchResult, Any]]:
    """A function ``race(settings, limit)``: as ``search``, with an evaluator of its own chunks."""

    def run(settings: Told, limit: int | None = None) -> tuple[SearchResult, Any]:
        evaluator = open_evaluator(settings.score, settings.compute, prepare(*settings).calibration)
        return search(settings, limit, evaluator=evaluator)

    return run


def test_a_raced_search_scores_its_winners_on_all_chunks(raced, race):
    result, compute = race(raced)
    total = len(prepare(*raced).calibration.chunks)
    assert total >= 4
    chunks = [trial.score.num_chunks for trial in result.trials]
    assert set(chunks) > {1, total}
    scored = {}
    for trial in result.trials:
        before = scored.get(trial.candidate, 0)
        scored[trial.candidate] = max(before, trial.score.num_chunks)
    assert len(compute.scored) == sum(scored.values()) < total * len(scored)
    assert result.score.num_chunks == total
    for number in {trial.generation for trial in result.trials}:
        trials = [trial for trial in result.trials if trial.generation == number]
        assert min(trials, key=lambda t: t.score.value).score.num_chunks == total
    rows = pq.read_table(raced.out / "trials.parquet").to_pylist()
    assert [row["chunks"] for row in rows] == chunks
    assert result.plan.provenance["chunks_scored"] == sum(scored.values())
    verified = [trial for trial in result.trials if trial.phase == "verified"]
    assert verified
    assert all(trial.score.num_chunks == total for trial in verified)
    assert result.score.value <= min(trial.score.value for trial in verified)


@pytest.mark.parametrize("limit", [20, pytest.param(45, marks=pytest.mark.slow)])
def test_a_raced_search_resumes_to_the_same_plan(tmp_path, raced, race, limit, elsewhere, outcome):
    whole, _ = race(elsewhere(raced, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        race(elsewhere(raced, tmp_path / "cut"), limit)
    result, compute = race(elsewhere(raced, tmp_path / "cut", resume=True))
    assert outcome(result) == outcome(whole)
    assert len(compute.scored) < sum(trial.score.num_chunks for trial in whole.trials)
