"""A Hub id stands for a model in every command; offline, the cache is used on every node."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from rayapp.plan import PruningPlan
from rayapp.workflows.prune import prune
from tests.told import Told

NAME, COMMIT = "owner/small", "c" * 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory, save_tiny) -> Path:
    """A cache of the Hub that holds one model, and calibration lines beside it."""
    home = tmp_path_factory.mktemp("hub")
    repo = home / "models--owner--small"
    shutil.copytree(save_tiny(home / "made", "llama"), repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    lines = [{"prompt": "ab" * (6 + n), "completion": "cd", "task": "t"} for n in range(3)]
    (home / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def search(run, hub: Path, out: Path, *options: object) -> PruningPlan:
    """Search the cached model by its id; ``run`` runs a job."""
    done = run(
        "prune", "--model", NAME, "--calibration", hub / "lines.jsonl", "--out", out,
        "--decode-remove", 1, "--method", "random", "--evaluations", 3, *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return PruningPlan.load(out)


@pytest.fixture
def run(hub, monkeypatch, run_job_here):
    """Runs jobs in this process, for which the cache is the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    return run_job_here


def test_an_id_is_recorded_and_used_by_the_commands_that_follow(hub, run, tmp_path):
    plan = search(run, hub, tmp_path / "plan")
    assert plan.provenance["model"] == {"id": NAME, "revision": COMMIT}
    evaluated = run(
        "evaluate", "--model", NAME, "--revision", COMMIT, "--plan", tmp_path / "plan",
        "--data", hub / "lines.jsonl", "--runs", 0, "--out", tmp_path / "result.json",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((tmp_path / "result.json").read_text())["complete"] is True
    chosen = run(
        "kv_select", "--model", f"{NAME}@{COMMIT}", "--plan", tmp_path / "plan",
        "--calibration", hub / "lines.jsonl", "--max-kl", 9,
    )  # fmt: skip
    assert chosen.returncode == 0, chosen.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "owner/other"), "is not in the cache"),
        (("--model", NAME, "--revision", "v2"), "is not in the cache"),
        (("--model", "./modle"), "no such model directory"),
    ],
)
def test_a_miss_is_one_clear_line(run, options, said):
    missed = run("evaluate", *options, "--data", "lines.jsonl")
    assert missed.returncode == 2
    assert said in missed.stderr
    assert len(missed.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.ray
def test_evaluators_of_a_cluster_find_the_model_by_its_id(
    hub, hub_cache, cluster, monkeypatch, tmp_path
):
    """The nodes look into a cache of their own, which has the model as well."""
    (model,) = hub.glob("models--*")
    shutil.copytree(model, hub_cache / model.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    found = [
        prune(
            *Told.of(
                model=NAME, calibration=str(hub / "lines.jsonl"), out=str(tmp_path / str(workers)),
                decode_remove=1, method="random", evaluations=3, workers=workers,
            )
        ).plan
        for workers in (0, 1)
    ]  # fmt: skip
    assert found[0].decode == found[1].decode
    assert found[1].provenance["model"] == {"id": NAME, "revision": COMMIT}
