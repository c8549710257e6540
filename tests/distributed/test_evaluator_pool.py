"""Searches on Ray evaluators: the same plan whatever their number and whatever becomes of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from rayapp.distributed.cluster import patience
from rayapp.distributed.cluster.nodes import free_nodes
from rayapp.distributed.evaluator_pool import EvaluatorPool
from rayapp.errors import ClusterError, ModelError
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.costs import measure_costs
from rayapp.pruning.measures.influence import measure_influence
from rayapp.pruning.preparation import prepare
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.search.run import SearchResult, run_search
from rayapp.workflows.prune import prune
from tests.told import Told

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(told) -> Told:
    """The search of the shared evaluators, without healing."""
    return told.but(heal="none", heal_data=None, evaluations=24)


@pytest.fixture(scope="module")
def local(settings, tmp_path_factory) -> SearchResult:
    return prune(*changed(settings, tmp_path_factory.mktemp("local"), workers=0))


def changed(settings: Told, out: Path, **changes: object) -> Told:
    return settings.but(out=str(out), **changes)


def same(result: SearchResult) -> tuple[object, ...]:
    trials = [(trial.candidate, trial.score.value) for trial in result.trials]
    return result.plan.fingerprint, result.score.value, trials


def test_workers_do_not_change_the_search(tmp_path, settings, local, on_evaluators):
    """With evaluators of its own, a search that heals does the same in the contract of healing."""
    result = prune(*changed(settings, tmp_path / "out"))
    assert same(result) == same(local)


def test_workers_do_not_change_a_race(tmp_path, settings, on_evaluators):
    alone = prune(*changed(settings, tmp_path / "alone", racing=True, workers=0))
    result = prune(*changed(settings, tmp_path / "out", racing=True))
    assert same(result) == same(alone)
    chunks = {trial.score.num_chunks for trial in result.trials}
    assert len(chunks) > 1
    assert result.score.num_chunks == max(chunks)


@pytest.mark.slow
def test_workers_know_images_and_train_on_them(tmp_path, tiny_llava_path, encoded_image, cluster):
    """Evaluators get the visual tokens, not the files."""
    for split in ("calibration", "heal"):
        (tmp_path / f"{split}.png").write_bytes(encoded_image(len(split)))
        lines = [
            {"prompt": f"thing {n}", "completion": "xy", "image": f"{split}.png"} for n in range(8)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{split}.jsonl").write_text(text)
    search = Told.of(
        model=str(tiny_llava_path(tmp_path / "model", "llava")),
        calibration=str(tmp_path / "calibration.jsonl"),
        heal="all",
        heal_data=str(tmp_path / "heal.jsonl"),
        heal_steps=2,
        out=str(tmp_path / "out"),
        decode_remove=1,
        prefill_remove=1,
        evaluations=12,
        visual_tokens="3",
    )
    result = prune(*changed(search, tmp_path / "out", workers=1))
    assert same(result) == same(prune(*changed(search, tmp_path / "alone")))
    assert result.plan.visual_tokens is not None


def test_a_killed_evaluator_changes_nothing(
    tmp_path, settings, local, prepared, evaluators, caplog, monkeypatch
):
    """Killed while it holds work, which is computed again elsewhere."""
    search = changed(settings, tmp_path / "out")
    kills: list[int] = []
    assert evaluators.measure(measure_costs).num_blocks == prepared.signature.num_blocks
    scorer = Scorer(prepared.calibration, search.score.scoring(), evaluators, weights="w")
    assign = evaluators._assign

    def assign_and_kill(waiting) -> None:
        assign(waiting)
        if scorer._memo and not kills:
            [(evaluator, piece), *_] = evaluators._busy.values()
            kills.append(piece.chunk)
            ray.kill(evaluator.actor)

    monkeypatch.setattr(evaluators, "_assign", assign_and_kill)
    result = run_search(search.score, search.search, scorer, prepared.signature)
    assert kills
    assert same(result) == same(local)
    assert "an evaluator was lost" in caplog.text


def die_once(evaluator: Evaluator, marker: Path) -> int:
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return evaluator.runner.num_blocks


@pytest.mark.slow
def test_a_measure_lost_with_its_evaluator_is_taken_on_another(
    tmp_path, prepared, evaluators, caplog
):
    found = evaluators.measure(die_once, tmp_path / "marker")
    assert found == prepared.signature.num_blocks
    assert "an evaluator was lost" in caplog.text


def test_a_node_that_cannot_read_the_model_is_a_model_error(tmp_path, settings, cluster):
    copy = shutil.copytree(settings.score.model, tmp_path / "model")
    search = changed(settings, tmp_path / "out", model=str(copy), workers=1)
    prepared = prepare(*search)
    shutil.rmtree(copy)
    with (
        EvaluatorPool(search.score, search.compute, prepared.calibration) as pool,
        pytest.raises(ModelError, match="no such"),
    ):
        pool.measure(measure_influence)


def test_evaluators_that_fit_nowhere_are_named(settings, prepared, cluster):
    search = settings.but(workers=1, threads=64)
    began = time.monotonic()
    with (
        EvaluatorPool(search.score, search.compute, prepared.calibration, hopeless_s=1) as pool,
        pytest.raises(ClusterError, match=r"each needs 64 CPU and 0 GPU, .*: 4 CPU, 0 GPU free"),
    ):
        pool.measure(measure_influence)
    assert time.monotonic() - began < 30


def test_evaluators_wait_for_what_others_use_and_say_so(
    settings, prepared, cluster, caplog, monkeypatch
):
    """The limit of what is hopeless does not count: others have all CPUs, for a while."""
    monkeypatch.setattr(patience, "TELL_EVERY_S", 0.5)
    search = settings.but(workers=1)
    others = placement_group(
        [{"CPU": node.free["CPU"]} for node in free_nodes()], strategy="STRICT_SPREAD"
    )
    assert others.wait(60)
    releasing = threading.Timer(3.0, remove_placement_group, [others])
    releasing.start()
    with EvaluatorPool(search.score, search.compute, prepared.calibration, hopeless_s=0.5) as pool:
        assert pool.measure(measure_costs).num_blocks == prepared.signature.num_blocks
    releasing.join()
    assert "0 of 1 were placed and load the model, the others wait for 1 CPU" in caplog.text
    assert ": 0 CPU, 0 GPU free" in caplog.text


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "prune.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.mark.slow
def test_a_killed_driver_ends_with_the_same_plan(tmp_path, settings):
    """Killed with its evaluators in the middle of a search; resumed without any."""
    sizes = {"prefill_remove": 2.0, "decode_remove": 2.0, "evaluations": 100}
    whole = prune(*changed(settings, tmp_path / "whole", workers=0, **sizes))
    killed = changed(settings, tmp_path / "killed", **sizes)
    script = (
        "import sys; from rayapp.workflows.prune import prune; "
        "from tests.told import Told; "
        "prune(*Told.parse(sys.argv[1]))"
    )
    on_ray = killed.but(workers=1).dumps()
    journal = tmp_path / "killed" / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script, on_ray], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "plan.json").exists()
    result = prune(*killed.but(resume=True, workers=0))
    assert same(result) == same(whole)


def test_the_job(tmp_path, settings):
    common = ["--model", settings.score.model, "--calibration", settings.score.calibration]
    sizes = ["--prefill-remove", "1", "--decode-remove", "1", "--evaluations", "24"]
    done = run_job(
        *common, *sizes, "--out", str(tmp_path / "out"), "--unit", "block", "--seed", "0"
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/out/plan.json: prefill[" in done.stdout
    assert "at most 0 left" in done.stderr
    assert "\x1b" not in done.stderr
