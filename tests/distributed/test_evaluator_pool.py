"""Searches on Ray evaluators: the same plan whatever their number and whatever becomes of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from rayapp.distributed.cluster import patience
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
def settings(tmp_path_factory, save_tiny) -> Told:
    directory = tmp_path_factory.mktemp("distributed")
    rng = random.Random(0)
    lines = [{"prompt": "ab" * rng.randint(1, 20), "completion": "cd"} for _ in range(8)]
    file = directory / "calibration.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Told.of(
        model=str(save_tiny(directory, "llama")),
        calibration=str(file),
        out=str(directory / "out"),
        prefill_remove=1,
        decode_remove=1,
        evaluations=24,
        chunk_tokens=100,
    )


@pytest.fixture(scope="module")
def local(settings) -> SearchResult:
    return prune(*settings)


@pytest.fixture(scope="module")
def ray_session():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


def changed(settings: Told, out: Path, **changes: object) -> Told:
    return settings.but(out=str(out), **changes)


def same(result: SearchResult) -> tuple[object, ...]:
    trials = [(trial.candidate, trial.score.value) for trial in result.trials]
    return result.plan.fingerprint, result.score.value, trials


def test_workers_do_not_change_the_search(tmp_path, settings, local, ray_session):
    result = prune(*changed(settings, tmp_path / "out", workers=2))
    assert same(result) == same(local)


def test_workers_do_not_change_a_race(tmp_path, settings, ray_session):
    alone = prune(*changed(settings, tmp_path / "alone", racing=True))
    result = prune(*changed(settings, tmp_path / "out", racing=True, workers=2))
    assert same(result) == same(alone)
    chunks = {trial.score.num_chunks for trial in result.trials}
    assert len(chunks) > 1
    assert result.score.num_chunks == max(chunks)


def test_workers_know_images_and_train_on_them(
    tmp_path, tiny_llava_path, encoded_image, ray_session
):
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
    result = prune(*changed(search, tmp_path / "out", workers=2))
    assert same(result) == same(prune(*changed(search, tmp_path / "alone")))
    assert result.plan.visual_tokens is not None


def test_a_killed_evaluator_changes_nothing(
    tmp_path, settings, local, ray_session, caplog, monkeypatch
):
    """Killed while it holds work, which is computed again elsewhere."""
    search = changed(settings, tmp_path / "out", workers=2)
    prepared = prepare(*search)
    kills: list[int] = []
    with EvaluatorPool(search.score, search.compute, prepared.calibration) as pool:
        assert pool.measure(measure_costs).num_blocks == prepared.signature.num_blocks
        scorer = Scorer(prepared.calibration, search.score.scoring(), pool, weights="w")
        assign = pool._assign

        def assign_and_kill(waiting) -> None:
            assign(waiting)
            if scorer._memo and not kills:
                [(evaluator, piece), *_] = pool._busy.values()
                kills.append(piece.chunk)
                ray.kill(evaluator.actor)

        monkeypatch.setattr(pool, "_assign", assign_and_kill)
        result = run_search(search.score, search.search, scorer, prepared.signature)
    assert kills
    assert same(result) == same(local)
    assert "an evaluator was lost" in caplog.text


def die_once(evaluator: Evaluator, marker: Path) -> int:
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return evaluator.runner.num_blocks


def test_a_measure_lost_with_its_evaluator_is_taken_on_another(
    tmp_path, settings, ray_session, caplog
):
    search = settings.but(workers=2)
    prepared = prepare(*search)
    with EvaluatorPool(search.score, search.compute, prepared.calibration) as pool:
        assert pool.measure(die_once, tmp_path / "marker") == prepared.signature.num_blocks
    assert "an evaluator was lost" in caplog.text


def test_a_node_that_cannot_read_the_model_is_a_model_error(tmp_path, settings, ray_session):
    copy = shutil.copytree(settings.score.model, tmp_path / "model")
    search = changed(settings, tmp_path / "out", model=str(copy), workers=1)
    prepared = prepare(*search)
    shutil.rmtree(copy)
    with (
        EvaluatorPool(search.score, search.compute, prepared.calibration) as pool,
        pytest.raises(ModelError, match="no such"),
    ):
        pool.measure(measure_influence)


def test_evaluators_that_fit_nowhere_are_named(tmp_path, settings, ray_session):
    search = changed(settings, tmp_path / "out", workers=1, threads=64)
    prepared = prepare(*search)
    began = time.monotonic()
    with (
        EvaluatorPool(search.score, search.compute, prepared.calibration, hopeless_s=1) as pool,
        pytest.raises(ClusterError, match=r"each needs 64 CPU and 0 GPU, .*: 2 CPU, 0 GPU free"),
    ):
        pool.measure(measure_influence)
    assert time.monotonic() - began < 30


def test_evaluators_wait_for_what_others_use_and_say_so(
    tmp_path, settings, ray_session, caplog, monkeypatch
):
    """The limit of what is hopeless does not count: another actor has the CPUs, for a while."""
    monkeypatch.setattr(patience, "TELL_EVERY_S", 0.5)
    search = changed(settings, tmp_path / "out", workers=1)
    prepared = prepare(*search)
    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.hold.remote())
    release = threading.Timer(3.0, ray.kill, [holder])
    release.start()
    with EvaluatorPool(search.score, search.compute, prepared.calibration, hopeless_s=0.5) as pool:
        assert pool.measure(measure_costs).num_blocks == prepared.signature.num_blocks
    release.join()
    assert "0 of 1 were placed and load the model, the others wait for 1 CPU" in caplog.text
    assert ": 0 CPU, 0 GPU free" in caplog.text


class Holder:
    """What an actor that only keeps its CPUs does."""

    def hold(self) -> None:
        return None


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
    whole = prune(*changed(settings, tmp_path / "whole", **sizes))
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
    result = prune(*killed.but(resume=True))
    assert same(result) == same(whole)


def test_the_job(tmp_path, settings, local):
    common = ["--model", settings.score.model, "--calibration", settings.score.calibration]
    sizes = ["--prefill-remove", "1", "--decode-remove", "1", "--evaluations", "24"]
    done = run_job(
        *common, *sizes, "--out", str(tmp_path / "out"), "--unit", "block", "--seed", "0"
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/out/plan.json: prefill[" in done.stdout
    assert "at most 0 left" in done.stderr
    assert "\x1b" not in done.stderr
    bad = run_job(*common, "--prefill-remove", "9", "--out", str(tmp_path / "bad"))
    assert bad.returncode == 2
    assert bad.stderr.strip() == "error: prefill_remove=9: the model has 5 blocks; remove 0 to 5"
