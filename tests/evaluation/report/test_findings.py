"""What is gathered of a plan directory, what is left out and why, and what is refused."""

from __future__ import annotations

import json

import pytest

from rayapp.errors import DataError, PlanError
from rayapp.evaluation.report.findings import gather
from rayapp.plan import KVTransfer, Mode, StagePlan

INFLUENCE = {
    "prefill_blocks": [0.5] * 6,
    "prefill_parts": [0.25] * 12,
    "decode_blocks": [0.125] * 6,
    "decode_parts": [0.0625] * 12,
}
JOURNAL = (
    json.dumps({"kind": "header", "version": 2})
    + "\n"
    + json.dumps({"kind": "influence", **INFLUENCE})
    + "\n"
    + '{"kind": "generation", "torn'
)
FOUND = (["1", "3"], ["3"])


@pytest.fixture
def home(blocks_plan, tmp_path):
    return blocks_plan.save(tmp_path / "found").parent


def sensitivity(weights: str = "feedc0de") -> dict:
    singles = {"objective": "kl", "score_by": "task", "dense": 0.0}
    stages = {"prefill": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "decode": [0.5] * 6}
    return {
        "weights": weights,
        "calibration": "c",
        "num_lines": 24,
        "influence": INFLUENCE,
        "singles": {**singles, **stages},
    }


def test_a_plan_alone(home, blocks_plan):
    found = gather(home)
    assert found.plan == blocks_plan
    assert found == type(found)(found.plan)
    assert gather(home / "plan.json") == found
    with pytest.raises(PlanError, match="cannot be read"):
        gather(home / "nowhere")


def test_all_that_a_search_leaves(home, write, parquet, evaluate_as, blocks_plan, ledger):
    rows = [
        ([], [], 0.0, 2),
        (["1"], [], 0.25, 2),
        (["2"], [], 9.0, 1),  # lost a race: no effect to show
        ([], ["3"], 0.5, 2),
        (*FOUND, 0.75, 2),
    ]
    write("found/trials.parquet", parquet(rows))
    write("found/journal.jsonl", JOURNAL)
    write("found/ledger.json", ledger)
    evaluate_as(blocks_plan).save(home / "evaluation.json")
    found = gather(home)
    assert [(list(t.prefill), list(t.decode), t.score, t.chunks) for t in found.trials] == rows
    assert found.influence.prefill_blocks == (0.5,) * 6
    assert found.influence_lines == 48
    assert found.singles.stages == {"prefill": {"1": 0.25}, "decode": {"3": 0.5}}
    assert found.ledger == ledger
    assert found.evaluation.plan.fingerprint == blocks_plan.fingerprint
    assert found.left_out == ()


def test_what_was_measured_for_the_report(home, write, parquet):
    write("found/trials.parquet", parquet([(["1"], [], 0.25, 2), (*FOUND, 0.75, 2)]))
    write("found/sensitivity.json", sensitivity())
    found = gather(home)
    assert found.singles.stages["prefill"]["5"] == 6.0
    assert "24 calibration lines" in found.singles.source
    assert (found.influence.decode_blocks[0], found.influence_lines) == (0.125, 24)
    write("found/journal.jsonl", JOURNAL)  # the search's own goes first
    assert gather(home).influence_lines == 48


def test_what_is_of_another_plan_is_left_out_and_named(
    home, write, parquet, evaluate_as, blocks_plan, kv_json
):
    other = blocks_plan.model_copy(update={"decode": StagePlan(blocks={2: Mode.REMOVED})})
    evaluate_as(other).save(home / "evaluation.json")
    write("found/trials.parquet", parquet([(["1"], [], 0.25, 2)]))
    write("found/kv.json", kv_json(other))
    write("found/sensitivity.json", sensitivity("other"))
    found = gather(home)
    assert (found.evaluation, found.trials, found.kv, found.influence) == (None, (), None, None)
    assert {line.split(":")[0] for line in found.left_out} == {
        "evaluation.json",
        "trials.parquet",
        "kv.json",
        "sensitivity.json",
    }
    assert found.singles.source == "scored by the search"


def test_kv_of_the_very_rules(home, write, kv_json, blocks_plan):
    rules = {0: KVTransfer(first=4, last=16)}
    chosen = blocks_plan.model_copy(update={"kv_transfer": rules})
    write("found/kv.json", kv_json(chosen))
    assert gather(home).kv is None  # the plan was reset since
    chosen.save(home)
    assert gather(home).kv.kv_transfer == rules
    write("found/kv.json", kv_json(chosen, complete=False))
    assert "did not finish" in gather(home).left_out[0]


def test_a_plan_of_a_front(home, write, parquet, blocks_plan, tmp_path):
    rows = [
        {"plan": "p", "prefill": p, "decode": d, "score": s, "prefill_s": 1.0, "decode_s": 2.0,
         "bytes_sent": 3}
        for p, d, s in [([], [], 0.0), (["1"], [], 0.25), (*FOUND, 0.75)]
    ]  # fmt: skip
    write("f/front.json", json.dumps(rows).encode())
    blocks_plan.save(tmp_path / "f" / "front" / "02")
    write("f/sizes/prefill-2-decode-1/trials.parquet", parquet([(*FOUND, 0.75, 2)]))
    write("f/sizes/prefill-1-decode-0/trials.parquet", parquet([(["1"], [], 0.25, 2)]))
    write("f/sizes/prefill-1-decode-0/journal.jsonl", JOURNAL)
    found = gather(tmp_path / "f" / "front" / "02")
    assert [row.score for row in found.front] == [0.0, 0.25, 0.75]
    assert [row.is_of(blocks_plan) for row in found.front] == [False, False, True]
    assert [t.score for t in found.trials] == [0.75]
    assert found.singles.stages == {"prefill": {"1": 0.25}}
    assert found.influence is not None
    write("front.json", json.dumps(rows[:2]).encode())
    assert gather(home).front == ()  # a front beside it that does not list it


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trials.parquet", b"PAR1", "no trials can be read"),
        ("evaluation.json", b"{}", "not an evaluation result"),
        ("ledger.json", b"[1]", "holds no JSON object"),
        ("ledger.json", b'{"totals": {}}', "is no ledger"),
        ("ledger.json", b'{"totals"', "is not JSON"),
        ("kv.json", b"{}", r"is no record of a selection \(complete"),
        ("front.json", b'{"a": 1}', "is no front"),
    ],
)
def test_damaged_files_are_named(home, write, name, content, message):
    write(f"found/{name}", content)
    with pytest.raises(DataError, match=f"{name}: .*{message}"):
        gather(home)


def test_what_is_given_must_fit(home, write, evaluate_as, blocks_plan, tmp_path, ledger):
    other = blocks_plan.model_copy(update={"decode": StagePlan(blocks={2: Mode.REMOVED})})
    file = evaluate_as(other).save(tmp_path / "other.json")
    with pytest.raises(DataError, match=f"evaluates plan {other.fingerprint}, but"):
        gather(home, evaluation=file)
    mine = evaluate_as(blocks_plan).save(tmp_path / "mine.json")
    sums = write("sums.json", ledger)
    found = gather(home, evaluation=mine, ledger=sums)
    assert (found.evaluation.complete, found.ledger) == (True, ledger)
    for missing in ({"evaluation": tmp_path / "no.json"}, {"ledger": tmp_path / "no.json"}):
        with pytest.raises(DataError, match=r"no\.json: cannot be read"):
            gather(home, **missing)


def test_a_damaged_influence_is_no_influence(home, write):
    write("found/journal.jsonl", '{"kind": "influence", "prefill_blocks": 3}\n')
    assert gather(home).influence is None
    write("found/sensitivity.json", b"{")
    assert "is damaged" in gather(home).left_out[0]
