"""The job that makes a paper's tables: on a small random model, and once on the test-bed."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from rayapp.errors import DataError, InputError, RayappError
from rayapp.evaluation.paper.numbers import ACCURACY, ALL_DATA, BY_DECODE, BYTES
from rayapp.evaluation.paper.outcome import RowOutcome, measure_data
from rayapp.evaluation.paper.presets import OURS, TABLES
from rayapp.evaluation.paper.rows import row_sizes, search_settings
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.evaluation.progress import shown_progress
from rayapp.models.architecture import signature
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.fingerprints.sampled_fingerprint import sampled_fingerprint
from rayapp.plan import PruningPlan
from rayapp.pruning.progress import ProgressReport
from rayapp.testbed.tasks import generate, write_jsonl
from rayapp.workflows.paper import plans as paper_plans
from rayapp.workflows.paper import reproduce as module
from rayapp.workflows.paper.reproduce import Watch, reproduce
from rayapp.workflows.renewal import renew

WATCH = Watch(search=ProgressReport, evaluation=shown_progress)
QUICK = ("similarity", "kv_modes", "kv_selected", "unified")


def text(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("abcdefgh ", k=count))


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    rng, home = random.Random(2), tmp_path_factory.mktemp("data")

    def answers(count: int) -> list[dict]:
        return [{"prompt": text(rng, 40), "completion": text(rng, 2)} for _ in range(count)]

    def questions(task: str) -> list[dict]:
        return [
            {"prompt": text(rng, 36), "choices": [" a", " bcd"], "answer": i % 2, "task": task}
            for i in range(3)
        ]

    return {
        "calibration": write(home / "calibration.jsonl", answers(6)),
        "heal_data": write(home / "heal.jsonl", answers(9)),
        "GSM": write(home / "gsm.jsonl", answers(4)),
        "MMLU": write(home / "mmlu.jsonl", questions("law") + questions("art")),
        "wiki": write(home / "wiki.jsonl", [{"text": text(rng, 90)} for _ in range(3)]),
    }


@pytest.fixture
def settings(checkpoint, files, tmp_path):
    return ReproduceSettings.checked(
        model=str(checkpoint),
        calibration=files["calibration"],
        data={name: files[name] for name in ("GSM", "MMLU", "wiki")},
        out=str(tmp_path / "out"),
        rows=QUICK,
        share=0.2,
        evaluations=3,
        target_reduction=1.5,
        num_runs=0,
        num_window_tokens=64,
        split="test",
    )


def numbers_of(out: Path) -> dict[str, dict[tuple[str, str], dict]]:
    record = json.loads((out / "tables" / "paper.json").read_text())
    return {
        row["name"]: {(n["data"], n["metric"]): n for n in row["numbers"]} for row in record["rows"]
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_job_makes_every_row(checkpoint, files, tmp_path, run_job):
    out = tmp_path / "out"
    options = {
        "model": checkpoint, "calibration": files["calibration"], "heal-data": files["heal_data"],
        "out": out, "share": 0.2, "evaluations": 3, "target-reduction": 1.5, "runs": 2,
        "window": 64, "split": "test", "heal": "all",
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    for name in ("GSM", "MMLU", "wiki"):
        words += ["--data", f"{name}={files[name]}"]
    result = run_job("reproduce", *words)
    assert result.returncode == 0, result.stderr
    numbers = numbers_of(out)
    assert list(numbers) == [row.name for row in TABLES]
    for row in TABLES:
        plan = PruningPlan.load(out / "rows" / row.name)
        removed = (0, 0) if row.name == "dense" else (1, 1)
        assert (plan.removed("prefill"), plan.removed("decode")) == removed
        assert (plan.healed is not None) == (
            row.healed or row.name in ("kv_selected", "unified")
        ), row.name
        assert row.title in result.stdout
        if row.beside:
            assert plan.prefill.blocks.keys() == plan.decode.blocks.keys()
    dense, unified, selected = (numbers[name] for name in ("dense", "unified", "kv_selected"))
    for (data, metric), number in dense.items():
        if data in ("GSM", "MMLU", "wiki", "mean") and metric != BY_DECODE:
            assert (number["difference"], number["bound"]) == pytest.approx((0.0, 0.0)), metric
    assert (dense["MMLU", "acc"]["num"], dense["wiki", "perplexity"]["num"]) == (6, 8)
    assert dense["mean", ACCURACY]["dense"] == pytest.approx(
        (dense["GSM", "exact match"]["dense"] + dense["MMLU", "acc"]["dense"]) / 2
    )
    assert (
        selected[ALL_DATA, BYTES]["difference"] > numbers["healed"][ALL_DATA, BYTES]["difference"]
    )
    assert (ALL_DATA, BYTES) not in unified, "nothing is sent"
    assert unified["wiki", "perplexity"] == selected["wiki", "perplexity"]
    assert selected["batch 8", "answer ms"]["num"] == 2
    lines = list(csv.DictReader((out / "tables" / "paper.csv").read_text().splitlines()))
    assert len(lines) == sum(map(len, numbers.values()))
    assert "Peers beside ours" in (out / "tables" / "paper.md").read_text()
    assert "not for quotation: 2 timed runs" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_the_test_bed_a_plan_with_kv_modes_loses_least(testbed_path, tmp_path):
    """Two blocks of each stage: skipping prefill's own compute is what this model bears best."""
    data = {}
    for name, count in (("calibration", 6), ("validation", 24)):
        path = tmp_path / f"{name}.jsonl"
        write_jsonl(path, [e for task in ("copy", "sort") for e in generate(task, name, count, 5)])
        data[name] = str(path)
    settings = ReproduceSettings.checked(
        model=str(testbed_path),
        calibration=data["calibration"],
        data={"tasks": data["validation"]},
        out=str(tmp_path / "out"),
        rows=("window", "kv_modes"),
        method="greedy",
        evaluations=24,
        num_runs=0,
    )
    paper = reproduce(settings, WATCH)
    dense, window, ours = (paper.number(row.name, "tasks", "exact match") for row in paper.rows)
    assert dense.plan > 95
    assert dense.num == 48
    assert ours.plan > window.plan + 5
    assert ours.difference == pytest.approx(dense.plan - ours.plan)
    assert ours.bound >= ours.difference


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(settings, monkeypatch):
    whole = reproduce(settings.model_copy(update={"out": settings.out + "-whole"}), WATCH)
    count = 0

    def dying(*arguments):
        nonlocal count
        count += 1
        if count > 4:
            raise RayappError("the machine went away")
        return measure_data(*arguments)

    monkeypatch.setattr(module, "measure_data", dying)
    with pytest.raises(RayappError, match="went away"):
        reproduce(settings, WATCH)
    kept = RowOutcome.load(Path(settings.out) / "rows" / "similarity")
    assert list(kept.data) == ["GSM"]
    assert list(numbers_of(Path(settings.out))) == ["dense"], "tables hold what is done"
    measured = []
    monkeypatch.setattr(
        module, "measure_data", lambda s, n, d: measured.append(n) or measure_data(s, n, d)
    )
    monkeypatch.setattr(paper_plans, "prune", None)
    monkeypatch.setattr(paper_plans, "kv_select", None)
    resumed = reproduce(settings.model_copy(update={"resume": True}), WATCH)
    assert measured == ["MMLU", "wiki", *3 * ("GSM", "MMLU", "wiki")][: len(measured)]
    plans = [row.plan for row in whole.rows]
    assert len(measured) == 2 + 3 * len({*plans} - {*plans[:2]}), "equal plans share their outcome"
    assert resumed.numbers == whole.numbers
    monkeypatch.setattr(module, "measure_data", None)
    again = reproduce(settings.model_copy(update={"resume": True}), WATCH)
    assert again.numbers == whole.numbers


def test_a_directory_of_other_settings_is_refused(settings):
    settings = settings.model_copy(update={"rows": ("unified",)})
    paper = reproduce(settings, WATCH)
    assert [row.name for row in paper.rows] == ["dense"]
    assert "needs one of the rows" in paper.left_out["unified"]
    with pytest.raises(InputError, match="already begun here; go on with --resume"):
        reproduce(settings, WATCH)
    with pytest.raises(InputError, match="seed: was 0, now 1"):
        reproduce(settings.model_copy(update={"resume": True, "seed": 1}), WATCH)


def test_a_directory_of_an_earlier_release_is_renewed(settings, monkeypatch):
    settings = settings.model_copy(update={"rows": ("similarity", "kv_selected")})
    with monkeypatch.context() as earlier:
        earlier.setattr(
            Checkpoint, "signature", lambda self: signature(self.config, sampled_fingerprint(self))
        )
        whole = reproduce(settings, WATCH)
    again = settings.model_copy(update={"resume": True})
    with pytest.raises(InputError, match=r"the reproduction .*`rayapp plan renew"):
        reproduce(again, WATCH)
    renew(settings.out, model=settings.model)
    monkeypatch.setattr(module, "measure_data", None)
    for name in ("prune", "kv_select"):
        monkeypatch.setattr(paper_plans, name, None)
    assert reproduce(again, WATCH).numbers == whole.numbers


def test_prompts_of_both_sides_are_refused_or_told(settings, files, tmp_path):
    seen = [json.loads(line) for line in Path(files["calibration"]).read_text().splitlines()]
    changed = [{**seen[0], "prompt": seen[0]["prompt"].upper() + " "}, *seen[1:2]]
    both = write(tmp_path / "both.jsonl", [*changed, {"prompt": "q", "completion": "r"}])
    inside = write(tmp_path / "inside.jsonl", [{"text": "Once: " + seen[2]["prompt"] + "!"}])
    data = {"both": both, "inside": inside}
    settings = settings.model_copy(update={"data": data, "rows": ()})
    with pytest.raises(DataError, match=r"2 in both, 1 in inside.*--allow-overlap"):
        reproduce(settings, WATCH)
    paper = reproduce(settings.model_copy(update={"allow_overlap": True}), WATCH)
    assert sum("prompts stand in what plans were chosen" in each for each in paper.caveats) == 2


def test_rows_are_left_out_with_their_reason(settings):
    update = {"target_reduction": None, "rows": ("healed", "kv_selected"), "num_window_tokens": 64}
    paper = reproduce(settings.model_copy(update=update), WATCH)
    assert paper.left_out == {
        "healed": "no --heal-data was given",
        "kv_selected": "no --target-reduction was given",
    }
    assert "left out, ours, kv modes, healed: no --heal-data was given" in paper.markdown()


def test_searches_are_as_large_as_they_should_be(settings, files, tmp_path):
    update = {"heal_data": files["heal_data"], "prefill_remove": 1, "decode_remove": 3}
    settings = settings.model_copy(update={**update, "share": None})
    by_name = {
        row.name: search_settings(
            row, settings, row_sizes(row, settings, 5), tmp_path, resume=False
        )
        for row in TABLES
        if row.search is not None
    }
    peers = [row for row in TABLES if row.beside == OURS]
    assert len(peers) == 6
    for name in (row.name for row in peers):
        assert (by_name[name].prefill_remove, by_name[name].decode_remove) == (2, 2)
        assert by_name[name].shared
        assert by_name[name].method == name
    ours, pdtrim = by_name["kv_modes"], by_name["pdtrim_healed"]
    assert (ours.prefill_remove, ours.decode_remove, ours.kv_modes) == (1, 3, True)
    assert (pdtrim.kv_modes, pdtrim.method, pdtrim.heal) == (False, "annealing", "pair")
    assert by_name["healed"].heal_data == files["heal_data"]
    assert by_name["kv_modes"].heal == "none"


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"rows": ("sleb",)}, "row 'sleb' is not known"),
        ({"prefill_remove": 1}, "give both --prefill-remove and --decode-remove"),
        ({"share": 0.2, "prefill_remove": 1, "decode_remove": 1}, "or --share"),
        ({"share": None, "prefill_remove": 9, "decode_remove": 9}, "the model has 5 blocks"),
        ({"data": {}}, "data="),
        ({"num_window_tokens": 1000}, "exceeds the model's context"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, update, message):
    values = {**settings.model_dump(), **update}
    with pytest.raises(InputError, match=message):
        reproduce(ReproduceSettings.checked(**values), WATCH)
    assert not Path(settings.out).exists()


def test_a_data_set_has_one_kind(settings, files, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(Path(files["MMLU"]).read_text() + Path(files["wiki"]).read_text())
    settings = settings.model_copy(update={"data": {"mixed": str(mixed)}})
    with pytest.raises(DataError, match="holds choices and texts"):
        reproduce(settings, WATCH)


def test_a_nameless_data_set_is_refused(checkpoint, files, run_job_here):
    words = ["--model", str(checkpoint), "--calibration", files["calibration"], "--out", "x"]
    result = run_job_here("reproduce", *words, "--data", files["GSM"])
    assert result.returncode == 2
    assert "is not NAME=FILE" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
