"""The preset of a whole paper, on a small random model and small published sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayapp.errors import DataError, InputError
from rayapp.evaluation.paper.presets import last_blocks
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.evaluation.progress import shown_progress
from rayapp.evaluation.sides import Sides
from rayapp.models.checkpoint import Checkpoint
from rayapp.plan import PruningPlan
from rayapp.pruning.progress import ProgressReport
from rayapp.pruning.search.sensitivity import SENSITIVITY_FILE, Sensitivity
from rayapp.workflows.paper import plans as paper_plans
from rayapp.workflows.paper import reproduce as module
from rayapp.workflows.paper.reproduce import Watch, count_work, reproduce

WATCH = Watch(search=ProgressReport, evaluation=shown_progress)


@pytest.fixture(scope="module")
def values(tmp_path_factory, save_tiny, published_sets):
    home = tmp_path_factory.mktemp("paper")
    sets = published_sets(home / "sets")
    return {
        "model": str(save_tiny(home, "llama")),
        "preset": "paper",
        "data": [f"ARC-e={sets}", f"XSum={sets}"],
        "calibration_per_task": 2,
        "maps": 2,
        "rows": "pop-p2-d0,singles-p1-d0",
        "num_runs": 1,
        "num_prompt_tokens": 16,
        "num_answer_tokens": 2,
        "batch_sizes": (1,),
        "num_window_tokens": 64,
        "limit": 4,
    }


@pytest.mark.slow
def test_a_paper_is_counted_made_and_gone_on_with(values, tmp_path, monkeypatch):
    out = tmp_path / "out"
    rows = "pop-p2-d0,singles-p1-d0,pop_healed-p2-d0"
    wanted = {**values, "out": str(out), "rows": rows, "heal": "linear"}
    settings = ReproduceSettings.checked(**wanted)
    before = count_work(settings, WATCH)
    assert [job.state for job in before.jobs] == 4 * ["2 to measure"]
    assert before.rate > 0
    assert f"4 of 4 rows left, {before.tokens:,} tokens at most" in before.table().markdown()
    paper = reproduce(settings, WATCH)
    names = ["dense", "pop-p2-d0", "singles-p1-d0", "pop_healed-p2-d0"]
    assert [row.name for row in paper.rows] == names
    pop, healed = (PruningPlan.load(out / "rows" / name) for name in (names[1], names[3]))
    assert (pop.prefill, pop.first_token) == (healed.prefill, healed.first_token)
    assert pop.healed is None
    assert healed.healed
    assert paper.rows[3].search.evaluations == 1
    maps = [out / "maps" / f"set-{n}" / SENSITIVITY_FILE for n in (0, 1)]
    singles = [Sensitivity.parse(file.read_bytes()).singles.prefill for file in maps]
    summed = [sum(costs) for costs in zip(*singles, strict=True)]
    plan = PruningPlan.load(out / "rows" / "singles-p1-d0")
    assert list(plan.prefill.blocks) == [summed.index(min(summed))]
    page = (out / "tables" / "paper.md").read_text()
    for picture in ("blocks.svg", "quality.svg"):
        assert f"]({picture})" in page
        assert (out / "tables" / picture).read_text().startswith("<?xml")
    record = json.loads((out / "tables" / "paper.json").read_text())
    assert [each["num_lines"] for each in record["maps"]] == [6, 6]
    monkeypatch.setattr(module, "measure_data", None)
    again = settings.model_copy(update={"resume": True})
    assert reproduce(again, WATCH).numbers == paper.numbers
    after = count_work(again, WATCH)
    assert [job.state for job in after.jobs] == 4 * ["done"]
    assert after.sentence() == "0 of 4 rows left, 0 tokens at most"


def test_the_dense_model_answers_questions_once(values, tmp_path, monkeypatch):
    sides, choices = [], Sides.choices
    monkeypatch.setattr(
        Sides, "choices", lambda self, side, asked: sides.append(side) or choices(self, side, asked)
    )
    wanted = {**values, "out": str(tmp_path / "out"), "rows": "pop-p2-d0,int8", "maps": 0}
    paper = reproduce(ReproduceSettings.checked(**wanted), WATCH)
    assert [row.name for row in paper.rows] == ["dense", "pop-p2-d0", "int8"]
    assert sides.count("plan") == 3 * sides.count("dense") > 0
    dense, *others = [row.data["ARC-e"].metrics[0].dense for row in paper.rows]
    assert others == [dense, dense]
    assert [row.only_decode for row in paper.rows] == [False, False, True]


def test_a_plan_that_two_rows_have_is_measured_once(values, tmp_path, monkeypatch):
    plan = last_blocks(2, 0, Checkpoint(values["model"]).signature())
    plan.save(tmp_path / "mine")
    measured, measure = [], module.measure_data
    monkeypatch.setattr(
        module, "measure_data", lambda *args: measured.append(args[1]) or measure(*args)
    )
    wanted = {**values, "out": str(tmp_path / "out"), "rows": "pop-p2-d0", "maps": 0}
    wanted["plans"] = [f"mine={tmp_path / 'mine' / 'plan.json'}"]
    paper = reproduce(ReproduceSettings.checked(**wanted), WATCH)
    _, pop, mine = paper.rows
    assert (mine.name, mine.plan) == ("mine", pop.plan)
    assert measured == 2 * list(pop.data)
    assert mine.data == pop.data
    assert mine.latency


def test_fewer_channels_are_judged_beside_fewer_blocks(values, tmp_path):
    wanted = {**values, "out": str(tmp_path), "rows": "pop-p1-d0,channels-p1-d0", "maps": 0}
    _, pop, channels = reproduce(ReproduceSettings.checked(**wanted), WATCH).rows
    plan = PruningPlan.load(tmp_path / "rows" / "channels-p1-d0")
    assert plan.removed("prefill") == plan.removed("decode") == 0
    assert plan.first_token == "decode"
    answers = [row.data["XSum"].metrics[0].plan for row in (pop, channels)]
    assert answers[0] != answers[1] != channels.data["XSum"].metrics[0].dense
    assert pop.latency
    assert not channels.latency, "zeros are still multiplied"
    assert channels.weights is None
    assert not channels.only_decode


@pytest.mark.slow
def test_a_searched_plan_sends_its_kv_as_int4_too(values, tmp_path):
    rows = "late-p1-d0,late_int4-p1-d0"
    wanted = {**values, "out": str(tmp_path), "rows": rows, "maps": 0, "evaluations": 2}
    _, late, encoded = reproduce(ReproduceSettings.checked(**wanted), WATCH).rows
    plan = PruningPlan.load(tmp_path / "rows" / encoded.name)
    assert plan.prefill == PruningPlan.load(tmp_path / "rows" / late.name).prefill
    assert {rule.encoding for rule in plan.kv_transfer.values()} == {"int4"}
    assert encoded.search is None
    assert encoded.timed_bytes[1] < late.timed_bytes[1]


@pytest.mark.slow
def test_a_plan_that_exists_is_a_row(values, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_plans, "prune", None)
    first = {**values, "out": str(tmp_path / "a"), "rows": "pop-p2-d0", "maps": 0}
    reproduce(ReproduceSettings.checked(**first), WATCH)
    given = tmp_path / "a" / "rows" / "pop-p2-d0" / "plan.json"
    second = {**first, "out": str(tmp_path / "b"), "rows": "int8", "plans": [f"mine={given}"]}
    paper = reproduce(ReproduceSettings.checked(**second), WATCH)
    assert [row.name for row in paper.rows] == ["dense", "int8", "mine"]
    assert paper.rows[2].plan == PruningPlan.load(given).fingerprint
    assert paper.left_out == {}
    taken = ReproduceSettings.checked(**{**second, "plans": [f"int8={given}"], "resume": True})
    with pytest.raises(InputError, match="plan 'int8' has the name of a row"):
        reproduce(taken, WATCH)


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        ({"rows": "pop-p9-d9"}, InputError, "row 'pop-p9-d9' is not known; use some of dense, pop"),
        ({"data": ["MMLU={sets}"]}, DataError, "holds no set 'MMLU' to judge by"),
        ({"plans": ["no plan"]}, InputError, "no plan is not NAME=PATH"),
    ],
)
def test_bad_input_is_named(values, tmp_path, update, error, message):
    sets = values["data"][0].partition("=")[2]
    changed = {**values, **update, "out": str(tmp_path / "out")}
    changed["data"] = [pair.format(sets=sets) for pair in changed["data"]]
    with pytest.raises(error, match=message):
        reproduce(ReproduceSettings.checked(**changed), WATCH)


@pytest.mark.slow
def test_plans_are_healed_by_linear_maps_alone(values, tmp_path):
    wanted = {**values, "out": str(tmp_path / "out"), "rows": "pop-p2-d0,pop_healed-p2-d0"}
    paper = reproduce(ReproduceSettings.checked(**wanted, heal="pair"), WATCH)
    assert "--heal linear" in paper.left_out["pop_healed-p2-d0"]


def test_rows_of_the_map_need_one(values, tmp_path):
    wanted = {**values, "out": str(tmp_path / "out"), "rows": "singles", "maps": 0}
    paper = reproduce(ReproduceSettings.checked(**wanted), WATCH)
    assert set(paper.left_out.values()) == {"--maps 0 was given"}
    assert [Path(row.name).name for row in paper.rows] == ["dense"]
