"""A directory that an earlier release wrote is refused, renewed, and then as good as new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rayapp.cli import app
from rayapp.errors import InputError, PlanError, RayappError
from rayapp.evaluation.report.findings import gather
from rayapp.models.architecture import signature
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.fingerprints.sampled_fingerprint import sampled_fingerprint
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import HEALED_FILE, PLAN_FILE, PruningPlan
from rayapp.pruning import renewal
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.healing.training import Healer
from rayapp.testbed import text_model_path, vision_model_path
from rayapp.workflows.renewal import renew

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_first_scheme_still_gives_what_committed_results_said():
    """The committed results were made when there was no other scheme."""
    paths = (text_model_path(), vision_model_path())
    found = [sampled_fingerprint(Checkpoint(path)) for path in paths]
    assert found == ["4b28faab45533915b6cfaae9", "29ddb6c2b856f5952a692fbc"]


def write(path: Path, count: int, seed: str) -> str:
    lines = [
        {"prompt": seed * (6 + n), "completion": "cd", "task": "xy"[n % 2]} for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory, save_tiny) -> dict[str, str]:
    home = tmp_path_factory.mktemp("renewal")
    return {
        "model": str(save_tiny(home, "llama")),
        "calibration": write(home / "calibration.jsonl", 4, "ab"),
        "heal_data": write(home / "heal.jsonl", 8, "ef"),
        "test": write(home / "test.jsonl", 3, "gh"),
    }


def rayapp(*arguments: object) -> str:
    """Run a command and return its output; its exceptions pass through."""
    run = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(run.exception, RayappError | KeyboardInterrupt | AssertionError):
        raise run.exception
    assert run.exit_code == 0, run.output
    return run.output.replace("\n", " ")


FRONT = ("--pareto", "--decode-remove", 1, "--evaluations", 3)
HEAL = ("--heal", "all", "--heal-steps", 2)


def prune(files, out, *options: object) -> None:
    rayapp(
        "prune", "--model", files["model"], "--calibration", files["calibration"], "--out", out,
        "--prefill-remove", 1, "--decode-remove", 2, "--method", "random", "--evaluations", 9,
        *options,
    )  # fmt: skip


def heal(files, out, *options: object) -> None:
    prune(files, out, *HEAL, "--heal-data", files["heal_data"], *options)


def kv_select(files, out) -> None:
    rayapp(
        "kv-select", "--model", files["model"], "--calibration", files["calibration"],
        "--plan", out, "--target-reduction", 2, "--first", 1, "--last", 1, "--last", 0.5,
    )  # fmt: skip


def measure(files, out) -> None:
    rayapp(
        "report", "--plan", out, "--sensitivity", "--model", files["model"],
        "--calibration", files["calibration"],
    )  # fmt: skip


def fill(files, out: Path) -> None:
    """All that commands leave in a plan directory."""
    heal(files, out)
    kv_select(files, out)
    rayapp(
        "evaluate", "--model", files["model"], "--plan", out, "--data", files["test"],
        "--runs", 0, "--out", out / "evaluation.json",
    )  # fmt: skip
    measure(files, out)


@pytest.fixture(scope="module")
def earlier_release():
    """While open, checkpoints are named by the first scheme."""

    def open_(monkeypatch):
        def of(self):
            return signature(self.config, sampled_fingerprint(self))

        monkeypatch.setattr(Checkpoint, "signature", of)

    return open_


@pytest.fixture(scope="module")
def written(files, earlier_release, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("written") / "plan"
    with pytest.MonkeyPatch.context() as monkeypatch:
        earlier_release(monkeypatch)
        fill(files, out)
    return out


@pytest.fixture
def old(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "old"))


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> Path:
    """The files that this release writes from the beginning."""
    out = tmp_path_factory.mktemp("undisturbed") / "plan"
    fill(files, out)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def scores_nothing(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(Evaluator, "line_sums", fail)
    monkeypatch.setattr(Healer, "heal", fail)


def test_an_old_plan_is_refused_in_one_line(old, files):
    with pytest.raises(PlanError) as refused:
        load_model(files["model"], plan=PruningPlan.load(old))
    assert f"`rayapp plan renew {old} --model MODEL`" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"journal.*the search .*`rayapp plan renew") as refused:
        heal(files, old, "--resume")
    assert str(old) in str(refused.value)


def test_all_that_lies_beside_it_is_renewed(old, files, undisturbed):
    before, found = contents(old), renew(old, model=files["model"])
    plan, model = PruningPlan.load(old), read_signature(files["model"])
    assert found.plans == (PLAN_FILE,)
    assert plan.model == model
    assert plan.provenance["renewed"]["weights_fingerprint"] == found.old_fingerprint
    names = {"journal.jsonl", "kv.json", "sensitivity.json", "evaluation.json"}
    pairs = {name for name in contents(undisturbed) if name.startswith("healed/")}
    assert {*found.records} == names | pairs
    after, wanted = contents(old), contents(undisturbed)
    assert after.keys() == wanted.keys()
    for name in ("trials.parquet", HEALED_FILE):
        assert after[name] == before[name]
    assert all(after[name] for name in pairs)
    for name in names:
        assert found.old_fingerprint.encode() not in after[name]
        assert model.weights_fingerprint.encode() in after[name]
    assert plan.fingerprint == PruningPlan.load(undisturbed).fingerprint
    assert plan.healed == PruningPlan.load(undisturbed).healed
    load_model(files["model"], plan=plan, stage="decode")
    assert plan.fingerprint in after["report.html"].decode()


def test_nothing_is_left_out_of_the_report(old, files):
    assert not gather(old).left_out
    renew(old, model=files["model"])
    found = gather(old)
    assert not found.left_out
    assert None not in (found.evaluation, found.kv, found.influence, found.singles)
    assert found.trials


def test_nothing_is_computed_again(old, files, undisturbed, monkeypatch):
    renew(old, model=files["model"])
    scores_nothing(monkeypatch)
    chosen = PruningPlan.load(old)
    heal(files, old, "--resume")
    bare = chosen.model_copy(update={"kv_transfer": {}})
    assert PruningPlan.load(old).fingerprint == bare.fingerprint != chosen.fingerprint
    assert PruningPlan.load(old).healed == chosen.healed
    kv_select(files, old)
    assert PruningPlan.load(old).fingerprint == chosen.fingerprint
    measure(files, old)


def test_twice_is_as_once(old, files):
    renew(old, model=files["model"])
    once = contents(old)
    again = renew(old, model=files["model"])
    assert not again.plans
    assert not again.records
    assert "already" in again.summary()
    assert contents(old) == once


@pytest.mark.parametrize("stop", ["kv.json", "healed", PLAN_FILE])
def test_interrupted_and_done_again(old, files, monkeypatch, tmp_path, stop):
    whole = tmp_path / "whole"
    renew(old, model=files["model"], out=whole)
    replace = renewal._replace

    def stopping(file, content):
        if file.name == stop:
            raise KeyboardInterrupt
        replace(file, content)

    with monkeypatch.context() as patched:
        patched.setattr(renewal, "_replace", stopping)
        if stop == "healed":
            patched.setattr(Path, "replace", stopping_rename(2))
        with pytest.raises(KeyboardInterrupt):
            renew(old, model=files["model"])
    assert PruningPlan.load(old).model.weights_fingerprint[:3] != "v2:"
    renew(old, model=files["model"])
    assert comparable(contents(old)) == comparable(contents(whole))


def stopping_rename(count):
    """``Path.replace`` that a kill meets in the middle of the trained pairs."""
    original, renamed = Path.replace, []

    def replace(self, target):
        if self.parent.name == "healed":
            renamed.append(target)
            if len(renamed) > count:
                raise KeyboardInterrupt
        return original(self, target)

    return replace


def comparable(found):
    return {name: content for name, content in found.items() if name[-3:] not in ("tml", "tmp")}


def test_into_another_directory(old, files, tmp_path):
    before = contents(old)
    found = renew(old / PLAN_FILE, model=files["model"], out=tmp_path / "new" / "plan")
    assert contents(old) == before
    assert found.directory == tmp_path / "new" / "plan"
    assert PruningPlan.load(found.directory).model == read_signature(files["model"])
    assert {*found.plans, *found.records} <= contents(found.directory).keys()
    for out in (found.directory, old / "inside"):
        with pytest.raises(InputError, match="give another --out"):
            renew(old, model=files["model"], out=out)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["plan"]


@torch.no_grad()
def test_another_model_is_refused_and_nothing_written(old, files, save_tiny, tmp_path):
    trained = Path(shutil.copytree(files["model"], tmp_path / "trained"))
    tensors = load_file(trained / "model.safetensors")
    tensors["model.norm.weight"][5] += 1
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    before = contents(old)
    for other in (trained, save_tiny(tmp_path, "qwen3")):
        with pytest.raises(PlanError, match="another model, or was trained since") as refused:
            renew(old, model=other)
        assert "\n" not in str(refused.value)
        with pytest.raises(PlanError):
            renew(old, model=other, out=tmp_path / "copy")
    assert contents(old) == before
    assert not (tmp_path / "copy").exists()
    renew(old, model=files["model"])
    with pytest.raises(PlanError, match="another model"):
        renew(old, model=trained)
    with pytest.raises(PlanError, match="cannot be read"):
        renew(tmp_path / "nowhere", model=files["model"])


def test_an_edited_signature_is_refused(old, files):
    content = json.loads((old / PLAN_FILE).read_text())
    content["model"]["vocab_size"] += 1
    (old / PLAN_FILE).write_text(json.dumps(content))
    before = contents(old)
    with pytest.raises(PlanError, match="vocab_size"):
        renew(old, model=files["model"])
    assert contents(old) == before


def test_a_search_that_was_killed_before_it_had_a_plan(old, files, undisturbed):
    journal = (old / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (old / "journal.jsonl").write_bytes(b"".join(journal[:2]) + journal[2][:20])
    for name in (PLAN_FILE, HEALED_FILE, "kv.json", "report.html", "trials.parquet"):
        (old / name).unlink()
    found = renew(old, model=files["model"])
    assert not found.plans
    assert "journal.jsonl" in found.records
    heal(files, old, "--resume")
    assert PruningPlan.load(old).healed == PruningPlan.load(undisturbed).healed


def test_a_front_and_its_searches(files, earlier_release, tmp_path, monkeypatch):
    out = tmp_path / "front"
    with pytest.MonkeyPatch.context() as patched:
        earlier_release(patched)
        prune(files, out, *FRONT)
    before = len(json.loads((out / "front.json").read_text()))
    assert before > 1
    found = renew(out, model=files["model"])
    rows = json.loads((out / "front.json").read_text())
    assert len(rows) == before
    assert {row["plan"] for row in rows} <= {*found.plans}
    for row in rows:
        plan = PruningPlan.load(out / row["plan"])
        assert plan.model == read_signature(files["model"])
        gathered = gather(out / row["plan"])
        assert gathered.trials
        assert not gathered.left_out
        assert plan.fingerprint in (out / row["plan"]).with_name("report.html").read_text()
    scores_nothing(monkeypatch)
    prune(files, out, *FRONT, "--resume")


def test_a_comparison_of_visual_pruning_is_of_the_renewed_plan(tmp_path):
    """The committed one, as it was before: it shows beside a plan of the shipped model only."""
    model, old = vision_model_path(), "29ddb6c2b856f5952a692fbc"
    now = read_signature(model)
    content = (RESULTS / "visual_quality-testbed-vision.json").read_bytes()
    assert now.weights_fingerprint.encode() in content
    plan = PruningPlan(
        model=now.model_copy(update={"weights_fingerprint": old}),
        visual_tokens={"num_keep": 64},
    )
    plan.save(tmp_path)
    earlier = renewal.renamed(content, {now.weights_fingerprint: old})
    (tmp_path / "visual_quality.json").write_bytes(earlier)
    assert gather(tmp_path).visual is not None
    found = renew(tmp_path, model=model)
    assert found.records == ("visual_quality.json",)
    assert (tmp_path / "visual_quality.json").read_bytes() == content
    gathered = gather(tmp_path)
    assert gathered.visual.model == gathered.plan.model == now
    assert not gathered.left_out


def test_plans_of_other_models_below_stay(old, files, tmp_path):
    other = {**json.loads((old / PLAN_FILE).read_text())}
    other["model"]["weights_fingerprint"] = "f" * 24
    (old / "other").mkdir()
    (old / "other" / PLAN_FILE).write_text(json.dumps(other))
    (old / "foreign").mkdir()
    (old / "foreign" / PLAN_FILE).write_text("{}]")
    before = contents(old / "other") | contents(old / "foreign")
    assert renew(old, model=files["model"]).plans == (PLAN_FILE,)
    assert contents(old / "other") | contents(old / "foreign") == before
    with pytest.raises(PlanError, match=r"f{24}"):
        renew(old / "other", model=files["model"])


def test_the_command(old, files):
    assert "are v2:" in rayapp("plan", "renew", old, "--model", files["model"])
    assert "already" in rayapp("plan", "renew", old, "--model", files["model"])
