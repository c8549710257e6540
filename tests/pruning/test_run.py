from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayapp.errors import InputError, SearchError
from rayapp.plan import PruningPlan
from rayapp.pruning.candidates import DENSE, Candidate
from rayapp.pruning.preparation import open_evaluator, prepare
from rayapp.pruning.progress import SearchProgress
from rayapp.pruning.run import SearchResult, run_search
from rayapp.pruning.scoring import LocalCompute, Scorer
from rayapp.pruning.settings import PruneSettings

SEARCH = {
    "method": "annealing",
    "prefill_remove": 1,
    "decode_remove": 2,
    "evaluations": 20,
    "generation_size": 4,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, save_tiny, write_calibration) -> PruneSettings:
    directory = tmp_path_factory.mktemp("search")
    return PruneSettings.checked(
        model=str(save_tiny(directory, "llama")),
        calibration=str(write_calibration(directory / "calibration.jsonl")),
        out=str(directory / "undisturbed"),
        **SEARCH,
    )


class Counting(LocalCompute):
    """Counts what is computed; stops after ``limit`` candidates as a kill would."""

    def __init__(self, evaluator, limit: int | None = None) -> None:
        super().__init__(evaluator)
        self.scored: list[Candidate] = []
        self.limit = limit

    def run(self, work):
        for done in super().run(work):
            self.scored += done.work.candidates
            if self.limit is not None and len(self.scored) > self.limit:
                raise KeyboardInterrupt
            yield done


@pytest.fixture(scope="module")
def evaluator(settings):
    return open_evaluator(settings, prepare(settings).calibration)


def search(settings, evaluator, limit=None, on_progress=None) -> tuple[SearchResult, Counting]:
    prepared = prepare(settings)
    assert len(prepared.calibration.chunks) == 1
    compute = Counting(evaluator, limit)
    scorer = Scorer(prepared.calibration, settings.scoring(), compute, weights="w")
    return run_search(settings, scorer, prepared.signature, on_progress=on_progress), compute


@pytest.fixture(scope="module")
def undisturbed(settings, evaluator) -> SearchResult:
    return search(settings, evaluator)[0]


def elsewhere(settings: PruneSettings, out: Path, **changes) -> PruneSettings:
    return settings.model_copy(update={"out": str(out), **changes})


def journal(out: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "journal.jsonl").read_text().splitlines()]


def test_what_is_written(settings, undisturbed):
    out = Path(settings.out)
    assert sorted(p.name for p in out.iterdir()) == ["journal.jsonl", "plan.json", "trials.parquet"]
    plan = PruningPlan.load(out)
    assert plan == undisturbed.plan
    assert plan.removed("prefill") == 1
    assert plan.removed("decode") == 2
    assert plan.provenance["settings"]["seed"] == 0
    assert plan.provenance["score"] == undisturbed.score.value
    assert plan.model == prepare(settings).signature
    kinds = [line["kind"] for line in journal(out)]
    assert kinds[:2] == ["header", "influence"]
    assert set(kinds[2:]) == {"generation"}


def test_trials_hold_every_score(settings, undisturbed):
    rows = pq.read_table(Path(settings.out) / "trials.parquet").to_pylist()
    assert len(rows) == len(undisturbed.trials) == undisturbed.evaluations == 21
    assert rows[0]["phase"] == "dense"
    assert rows[0]["score"] == undisturbed.dense_score.value == 0.0
    full = [r for r in rows if r["prefill_removed"] == 1 and r["decode_removed"] == 2]
    best = min(full, key=lambda row: row["score"])
    assert best["score"] == undisturbed.score.value
    assert best["score/x"] == undisturbed.score.tasks["x"]
    assert [int(block) for block in best["decode"]] == list(undisturbed.plan.decode.blocks)
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.parametrize("limit", [0, 1, 7, 15, 20])
def test_killed_and_resumed_ends_with_the_same_plan(
    tmp_path, settings, evaluator, undisturbed, limit
):
    cut = elsewhere(settings, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        search(cut, evaluator, limit)
    written = {
        c
        for line in journal(tmp_path)[1:]
        if "trials" in line
        for c in map(_candidate, line["trials"])
    }
    result, compute = search(elsewhere(settings, tmp_path, resume=True), evaluator)
    assert _same(result) == _same(undisturbed)
    assert not written & set(compute.scored)
    assert len(compute.scored) == 21 - len(written)
    assert journal(tmp_path)[1:] == _without_seconds_like(
        journal(tmp_path)[1:], journal(settings.out)[1:]
    )


def _candidate(record: dict) -> Candidate:
    return Candidate(tuple(record["prefill"]), tuple(record["decode"]))


def _same(result: SearchResult) -> tuple:
    plan = result.plan.model_copy(update={"provenance": {}})
    return plan, result.score.value, [(t.candidate, t.score.value) for t in result.trials]


def _without_seconds_like(found: list[dict], wanted: list[dict]) -> list[dict]:
    """``wanted`` with the seconds of ``found``, which no two runs share."""
    for line, like in zip(wanted, found, strict=True):
        for record, timed in zip(line.get("trials", []), like.get("trials", []), strict=True):
            record["seconds"] = timed["seconds"]
    return wanted


@pytest.mark.parametrize("torn", [1, 40])
def test_a_torn_last_line_is_tolerated(tmp_path, settings, evaluator, undisturbed, torn):
    whole = (Path(settings.out) / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole[:-torn])
    result, compute = search(elsewhere(settings, tmp_path, resume=True), evaluator)
    assert _same(result) == _same(undisturbed)
    assert len(compute.scored) == len(journal(settings.out)[-1]["trials"])
    assert all(line["kind"] for line in journal(tmp_path))


def test_a_finished_search_resumes_without_scoring(tmp_path, settings, evaluator, undisturbed):
    (tmp_path / "journal.jsonl").write_bytes((Path(settings.out) / "journal.jsonl").read_bytes())
    result, compute = search(elsewhere(settings, tmp_path, resume=True), evaluator)
    assert _same(result) == _same(undisturbed)
    assert compute.scored == []


def test_resume_without_a_journal_starts(tmp_path, settings, evaluator, undisturbed):
    result, _ = search(elsewhere(settings, tmp_path / "fresh", resume=True), evaluator)
    assert _same(result) == _same(undisturbed)


def test_a_journal_is_not_overwritten(settings, evaluator, undisturbed):
    with pytest.raises(InputError, match="go on with --resume"):
        search(settings, evaluator)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "settings.seed: journal 0, now 1"),
        ({"objective": "nll"}, "settings.objective: journal 'kl', now 'nll'"),
        ({"decode_remove": 1.0}, "settings.decode_remove: journal 2.0, now 1.0"),
    ],
)
def test_a_journal_of_other_settings_is_refused(
    tmp_path, settings, evaluator, undisturbed, changes, named
):
    (tmp_path / "journal.jsonl").write_bytes((Path(settings.out) / "journal.jsonl").read_bytes())
    with pytest.raises(InputError) as error:
        search(elsewhere(settings, tmp_path, resume=True, **changes), evaluator)
    assert named in str(error.value)


def test_a_journal_of_other_data_is_refused(
    tmp_path, settings, evaluator, undisturbed, write_calibration
):
    (tmp_path / "journal.jsonl").write_bytes((Path(settings.out) / "journal.jsonl").read_bytes())
    other = str(write_calibration(tmp_path / "other.jsonl", seed=1))
    with pytest.raises(InputError, match="calibration: journal"):
        search(elsewhere(settings, tmp_path, resume=True, calibration=other), evaluator)


def test_an_edited_journal_is_refused(tmp_path, settings, evaluator, undisturbed):
    lines = journal(settings.out)
    lines[4]["trials"][0]["decode"] = [8, 9]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(SearchError, match="the journal was edited"):
        search(elsewhere(settings, tmp_path, resume=True), evaluator)


def test_a_score_that_is_not_finite_ends_the_search_and_keeps_the_journal(
    tmp_path, settings, evaluator
):
    class Broken(Counting):
        def run(self, work):
            for done in super().run(work):
                bad = any(c.removed("decode") == 2 and c.prefill for c in done.work.candidates)
                sums = [tuple(float("nan") for _ in row) for row in done.sums]
                yield replace(done, sums=tuple(sums)) if bad else done

    prepared = prepare(settings)
    scorer = Scorer(prepared.calibration, settings.scoring(), Broken(evaluator), weights="w")
    with pytest.raises(SearchError, match="scores nan"):
        run_search(elsewhere(settings, tmp_path), scorer, prepared.signature)
    assert sum(len(line.get("trials", [])) for line in journal(tmp_path)) > 4


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prefill_remove": 6.0}, "the model has 5 blocks"),
        ({"prefill_remove": 3.0, "kv_modes": False}, "prefill removes only what decode removes"),
        ({"prefill_remove": 0.5}, "whole blocks are removed"),
        ({"prefill_remove": 0.0, "decode_remove": 0.0}, "nothing to search"),
    ],
)
def test_sizes_that_contradict_a_rule(tmp_path, settings, changes, rule):
    with pytest.raises(InputError, match=rule):
        prepare(elsewhere(settings, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_bad_settings_are_one_line_each():
    with pytest.raises(InputError) as error:
        PruneSettings.checked(model="m", calibration="c", out="o", method="magic", evaluations=0)
    assert "method='magic'" in str(error.value)
    assert "evaluations=0" in str(error.value)
    assert "\n" not in str(error.value)


def test_progress_counts_up_to_the_end(tmp_path, settings, evaluator):
    seen: list[SearchProgress] = []
    search(elsewhere(settings, tmp_path), evaluator, on_progress=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == 21
    assert seen[-1].left == 0
    assert all(progress.done + progress.left == pytest.approx(21) for progress in seen)
    assert seen[0].best is None
    assert seen[-1].best_score == min(p.best_score for p in seen if p.best_score is not None)


SCRIPT = """
import sys
from rayapp.pruning.preparation import open_evaluator, prepare
from rayapp.pruning.run import run_search
from rayapp.pruning.scoring import LocalCompute, Scorer
from rayapp.pruning.settings import PruneSettings
settings = PruneSettings.model_validate_json(sys.argv[1])
prepared = prepare(settings)
compute = LocalCompute(open_evaluator(settings, prepared.calibration))
scorer = Scorer(prepared.calibration, settings.scoring(), compute, weights="w")
run_search(settings, scorer, prepared.signature)
"""


def test_kill_9_of_the_process_and_resume(tmp_path, settings, evaluator):
    """A real kill in the middle: however far it came, the plan is the undisturbed one."""
    whole = elsewhere(settings, tmp_path / "whole", evaluations=150)
    killed = elsewhere(whole, tmp_path / "killed")
    file = tmp_path / "killed" / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, killed.model_dump_json()])
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "plan.json").exists()
    num_lines = len(file.read_bytes().splitlines())
    result, _ = search(killed.model_copy(update={"resume": True}), evaluator)
    undisturbed, _ = search(whole, evaluator)
    assert _same(result) == _same(undisturbed)
    assert 5 <= num_lines < len(journal(tmp_path / "killed"))
    assert DENSE in {trial.candidate for trial in result.trials}


def test_a_model_that_is_not_finite_is_one_clear_error(tmp_path, settings, evaluator):
    class Broken(Counting):
        def influence(self):
            found = super().influence()
            return replace(found, decode_blocks=(float("nan"), *found.decode_blocks[1:]))

    prepared = prepare(settings)
    scorer = Scorer(prepared.calibration, settings.scoring(), Broken(evaluator), weights="w")
    with pytest.raises(SearchError, match=r"influence decode_blocks\[0\] is nan"):
        run_search(elsewhere(settings, tmp_path), scorer, prepared.signature)
    assert [line["kind"] for line in journal(tmp_path)] == ["header"]


def test_a_disk_that_fills_up_ends_the_search_which_can_go_on(
    tmp_path, settings, evaluator, undisturbed
):
    """The kernel refuses the write in the middle of a line, as a full disk does."""
    whole = len((Path(settings.out) / "journal.jsonl").read_bytes())
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * whole // 3, limits[1]))
        with pytest.raises(SearchError, match=r"journal.jsonl: cannot be written .* --resume"):
            search(elsewhere(settings, tmp_path), evaluator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    kept = (tmp_path / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    assert len([line for line in kept if b'"generation"' in line]) > 1
    result, compute = search(elsewhere(settings, tmp_path, resume=True), evaluator)
    assert _same(result) == _same(undisturbed)
    assert 0 < len(compute.scored) < 21


@pytest.fixture(scope="module")
def raced(tmp_path_factory, settings) -> PruneSettings:
    """Six chunks, of which losers see some."""
    out = str(tmp_path_factory.mktemp("raced") / "out")
    changes = {"out": out, "racing": True, "chunk_tokens": 24, "generation_size": 8}
    return settings.model_copy(update=changes)


def race(settings: PruneSettings, limit: int | None = None) -> tuple[SearchResult, Counting]:
    prepared = prepare(settings)
    compute = Counting(open_evaluator(settings, prepared.calibration), limit)
    scorer = Scorer(prepared.calibration, settings.scoring(), compute, weights="w")
    return run_search(settings, scorer, prepared.signature), compute


def test_a_raced_search_scores_its_winners_on_all_chunks(raced):
    result, compute = race(raced)
    total = len(prepare(raced).calibration.chunks)
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
    rows = pq.read_table(Path(raced.out) / "trials.parquet").to_pylist()
    assert [row["chunks"] for row in rows] == chunks
    assert result.plan.provenance["chunks_scored"] == sum(scored.values())
    verified = [trial for trial in result.trials if trial.phase == "verified"]
    assert verified
    assert all(trial.score.num_chunks == total for trial in verified)
    assert result.score.value <= min(trial.score.value for trial in verified)


@pytest.mark.parametrize("limit", [20, 45])
def test_a_raced_search_resumes_to_the_same_plan(tmp_path, raced, limit):
    whole, _ = race(elsewhere(raced, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        race(elsewhere(raced, tmp_path / "cut"), limit)
    result, compute = race(elsewhere(raced, tmp_path / "cut", resume=True))
    assert _same(result) == _same(whole)
    assert len(compute.scored) < sum(trial.score.num_chunks for trial in whole.trials)


def test_one_set_for_both_stages(tmp_path, settings, evaluator):
    sizes = {"prefill_remove": 2.0, "decode_remove": 2.0, "shared": True}
    whole = {"method": "exhaustive", "evaluations": None}
    result, _ = search(elsewhere(settings, tmp_path, **sizes, **whole), evaluator)
    assert len(result.trials) == 1 + 10
    assert all(trial.candidate.prefill == trial.candidate.decode for trial in result.trials)
    best = min(result.trials[1:], key=lambda trial: trial.score.value).candidate
    assert Candidate.from_plan(result.plan) == best
    annealed, _ = search(elsewhere(settings, tmp_path / "a", **sizes, evaluations=10), evaluator)
    assert annealed.plan.fingerprint == result.plan.fingerprint


def test_only_the_pruning_set_is_removed(tmp_path, settings, evaluator, undisturbed):
    influence = evaluator_influence(settings)
    stages = (influence["prefill_blocks"], influence["decode_blocks"])
    threshold = 1 - max(sorted(values)[2] for values in stages)  # at least three blocks each
    sets = [{b for b, v in enumerate(values) if 1 - v >= threshold} for values in stages]
    assert min(map(len, sets)) < 5
    changes = {"pruning_set": True, "distillation_threshold": threshold}
    result, _ = search(elsewhere(settings, tmp_path, **changes), evaluator)
    for trial in result.trials:
        prefill, decode = trial.candidate.labels("prefill"), trial.candidate.labels("decode")
        assert {int(b) for b in prefill} <= sets[0]
        assert {int(b) for b in decode} <= sets[1]
    with pytest.raises(InputError, match="only 0 blocks of prefill may be removed"):
        search(
            elsewhere(settings, tmp_path / "b", pruning_set=True, distillation_threshold=1.0),
            evaluator,
        )


def evaluator_influence(settings: PruneSettings) -> dict[str, list[float]]:
    return next(line for line in journal(settings.out) if line["kind"] == "influence")
