"""``rayapp plan-capacity``: sizes, prices, drawings, and errors that help."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from rayapp.cli import main
from tests.simulation.test_simulate import COSTS

LOAD = ("--load", "poisson", "--rate", "1", "--span-s", "60", "--most-replicas", "4")
TARGETS = ("--ttft-ms", "12000", "--tpot-ms", "60")


@pytest.fixture
def costs(tmp_path):
    path = tmp_path / "costs.json"
    COSTS.model_copy(update={"name": "tested"}).save(path)
    return path


def test_it_says_what_to_run_and_draws_the_time_line(costs, tmp_path, capsys):
    main_ok("--costs", str(costs), *LOAD, *TARGETS, "--out", str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert "Replicas that the load needs" in told
    assert "with tested: " in told
    assert "per million answer tokens" in told
    drawing = ElementTree.parse(tmp_path / "out" / "timeline-1.svg").getroot()
    assert drawing.find("{*}title").text == "Pools that follow the load: tested"
    assert len(drawing.findall("{*}polyline")) == 4


def test_json_has_every_plan_the_cheapest_first(costs, tmp_path, capsys):
    slow = COSTS.model_copy(update={"name": "slow", "decode": COSTS.decode.model_copy(
        update={"row_s": 0.004})})  # fmt: skip
    slow.save(tmp_path / "slow.json")
    paths = ("--costs", str(tmp_path / "slow.json"), "--costs", str(costs))
    main_ok(*paths, *LOAD, *TARGETS, "--json")
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], second["name"]) == ("tested", "slow")
    assert first["is_met"]
    price = "price_per_million_tokens"
    assert first["fixed"][price] <= second["fixed"][price]
    assert first["fixed"]["within"] >= 0.99


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ((), "no costs: give --costs FILE"),
        (("--plan", "x"), "--plan without --model"),
        (("--costs", "missing.json"), "no file of stage costs"),
        (("--costs", "COSTS", "--trace", "missing.csv"), "is no trace"),
        (("--costs", "COSTS", "--attainment", "1.5"), "--attainment"),
    ],
)
def test_bad_input_is_one_line(costs, words, fault, capsys):
    words = [str(costs) if word == "COSTS" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main(["plan-capacity", *words])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert fault in told
    assert told.count("\n") == 1


def test_a_model_is_measured_now(save_tiny, tmp_path, capsys):
    where, model = tmp_path / "kept", save_tiny(tmp_path, "llama")
    main_ok(
        "--model", str(model), "--max-num-seqs", "2", "--save-costs", str(where),
        "--rate", "1", "--span-s", "5", "--most-replicas", "2", "--json",
    )  # fmt: skip
    (found,) = json.loads(capsys.readouterr().out)
    kept = json.loads((where / "costs-1.json").read_text())
    assert kept["name"] == found["name"]
    assert sum(kept["prefill"].values()) > 0.0
    assert sum(kept["decode"].values()) > 0.0
    assert kept["prompt_kv_bytes"] > 0.0


def main_ok(*words):
    with pytest.raises(SystemExit) as stop:
        main(["plan-capacity", *words])
    assert not stop.value.code
