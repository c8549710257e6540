"""What a search writes; and cut off anywhere, it goes on to the plan it would have found."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayapp.errors import SearchError
from rayapp.plan import PruningPlan
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.preparation import prepare
from rayapp.pruning.progress import SearchProgress


def test_what_is_written(settings, undisturbed, journal):
    out = settings.out
    assert sorted(p.name for p in out.iterdir()) == ["journal.jsonl", "plan.json", "trials.parquet"]
    plan = PruningPlan.load(out)
    assert plan == undisturbed.plan
    assert plan.removed("prefill") == 1
    assert plan.removed("decode") == 2
    assert plan.provenance["settings"]["seed"] == 0
    assert plan.provenance["score"] == undisturbed.score.value
    assert plan.model == prepare(*settings).signature
    kinds = [line["kind"] for line in journal(out)]
    assert kinds[:2] == ["header", "influence"]
    assert set(kinds[2:]) == {"generation"}


def test_trials_hold_every_score(settings, undisturbed):
    rows = pq.read_table(settings.out / "trials.parquet").to_pylist()
    assert len(rows) == len(undisturbed.trials) == undisturbed.evaluations == 21
    assert rows[0]["phase"] == "dense"
    assert rows[0]["score"] == undisturbed.dense_score.value == 0.0
    full = [r for r in rows if r["prefill_removed"] == 1 and r["decode_removed"] == 2]
    best = min(full, key=lambda row: row["score"])
    assert best["score"] == undisturbed.score.value
    assert best["score/x"] == undisturbed.score.tasks["x"]
    assert [int(block) for block in best["decode"]] == list(undisturbed.plan.decode.blocks)
    assert all(row["seconds"] > 0 for row in rows)


def test_progress_counts_up_to_the_end(tmp_path, settings, search, elsewhere):
    seen: list[SearchProgress] = []
    search(elsewhere(settings, tmp_path), on_progress=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == 21
    assert seen[-1].left == 0
    assert all(progress.done + progress.left == pytest.approx(21) for progress in seen)
    assert seen[0].best is None
    assert seen[-1].best_score == min(p.best_score for p in seen if p.best_score is not None)


@pytest.mark.parametrize("limit", [0, 1, 7, 15, 20])
def test_killed_and_resumed_ends_with_the_same_plan(
    tmp_path, settings, undisturbed, limit, search, elsewhere, journal, outcome
):
    cut = elsewhere(settings, tmp_path)
    with pytest.raises(KeyboardInterrupt, match="--resume goes on") as stop:
        search(cut, limit)
    kept = (tmp_path / "plan.json").is_file()
    assert kept == ("best so far" in str(stop.value))
    assert kept or limit < 20
    if kept:
        assert PruningPlan.load(tmp_path).provenance["interrupted"]
    written = {
        c
        for line in journal(tmp_path)[1:]
        if "trials" in line
        for c in map(_candidate, line["trials"])
    }
    result, compute = search(elsewhere(settings, tmp_path, resume=True))
    assert outcome(result) == outcome(undisturbed)
    assert "interrupted" not in result.plan.provenance
    assert not written & set(compute.scored)
    assert len(compute.scored) == 21 - len(written)
    assert journal(tmp_path)[1:] == _without_seconds_like(
        journal(tmp_path)[1:], journal(settings.out)[1:]
    )


def _candidate(record: dict) -> Candidate:
    return Candidate(tuple(record["prefill"]), tuple(record["decode"]))


def _without_seconds_like(found: list[dict], wanted: list[dict]) -> list[dict]:
    """The object ``wanted`` with the seconds of ``found``, which no two runs share."""
    for line, like in zip(wanted, found, strict=True):
        for record, timed in zip(line.get("trials", []), like.get("trials", []), strict=True):
            record["seconds"] = timed["seconds"]
    return wanted


@pytest.mark.parametrize("torn", [1, 40])
def test_a_torn_last_line_is_tolerated(
    tmp_path, settings, undisturbed, torn, search, elsewhere, journal, outcome
):
    whole = (settings.out / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole[:-torn])
    result, compute = search(elsewhere(settings, tmp_path, resume=True))
    assert outcome(result) == outcome(undisturbed)
    assert len(compute.scored) == len(journal(settings.out)[-1]["trials"])
    assert all(line["kind"] for line in journal(tmp_path))


def test_a_finished_search_resumes_without_scoring(
    tmp_path, settings, undisturbed, search, elsewhere, outcome
):
    (tmp_path / "journal.jsonl").write_bytes((settings.out / "journal.jsonl").read_bytes())
    result, compute = search(elsewhere(settings, tmp_path, resume=True))
    assert outcome(result) == outcome(undisturbed)
    assert compute.scored == []


def test_resume_without_a_journal_starts(
    tmp_path, settings, undisturbed, search, elsewhere, outcome
):
    result, _ = search(elsewhere(settings, tmp_path / "fresh", resume=True))
    assert outcome(result) == outcome(undisturbed)


ROOT = Path(__file__).parents[4]

SCRIPT = """
import sys
from rayapp.pruning.preparation import open_evaluator, prepare
from rayapp.pruning.search.run import run_search
from rayapp.pruning.scorer import LocalCompute, Scorer
from tests.told import Told
told = Told.parse(sys.argv[1])
prepared = prepare(*told)
compute = LocalCompute(open_evaluator(told.score, told.compute, prepared.calibration))
scorer = Scorer(prepared.calibration, told.score.scoring(), compute, weights="w")
run_search(told.score, told.search, scorer, prepared.signature)
"""


@pytest.mark.slow
def test_kill_9_of_the_process_and_resume(tmp_path, settings, search, elsewhere, journal, outcome):
    """A kill in the middle of a real process changes no plan, however far the search had come."""
    whole = elsewhere(settings, tmp_path / "whole", evaluations=150)
    killed = elsewhere(whole, tmp_path / "killed")
    file = tmp_path / "killed" / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, killed.dumps()], cwd=ROOT)
    deadline = time.monotonic() + 240
    while not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "plan.json").exists()
    num_lines = len(file.read_bytes().splitlines())
    result, _ = search(killed.but(resume=True))
    undisturbed, _ = search(whole)
    assert outcome(result) == outcome(undisturbed)
    assert 5 <= num_lines < len(journal(tmp_path / "killed"))
    assert DENSE in {trial.candidate for trial in result.trials}


def test_a_disk_that_fills_up_ends_the_search_which_can_go_on(
    tmp_path, settings, undisturbed, search, elsewhere, outcome
):
    """The kernel refuses the write in the middle of a line, as a full disk does."""
    whole = len((settings.out / "journal.jsonl").read_bytes())
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * whole // 3, limits[1]))
        with pytest.raises(SearchError, match=r"journal.jsonl: cannot be written .* --resume"):
            search(elsewhere(settings, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    kept = (tmp_path / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    assert len([line for line in kept if b'"generation"' in line]) > 1
    result, compute = search(elsewhere(settings, tmp_path, resume=True))
    assert outcome(result) == outcome(undisturbed)
    assert 0 < len(compute.scored) < 21
