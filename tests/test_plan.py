"""Every rule of the plan is enforced where a plan is read, and errors name the path."""

from __future__ import annotations

import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayapp.errors import PlanError
from rayapp.plan import STAGE_MODES, KVTransfer, Mode, ModelSignature, PruningPlan

SIGNATURE = {
    "model_type": "llama",
    "num_blocks": 6,
    "hidden_size": 64,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "weights_fingerprint": "abc",
}


def parse(**content):
    return PruningPlan.parse(json.dumps({"model": SIGNATURE, **content}))


@st.composite
def plans(draw):
    prefill, decode, transfer = {}, {}, {}
    for block in range(6):
        theirs = draw(st.sampled_from(sorted(STAGE_MODES["decode"])))
        ours = draw(st.sampled_from([m for m in sorted(Mode) if m.writes_kv or not theirs.attends]))
        prefill[block], decode[block] = ours, theirs
        if theirs.attends and draw(st.booleans()):
            transfer[block] = {
                "first": draw(st.integers(1, 9) | st.floats(0.01, 1.0)),
                "last": draw(st.integers(0, 9) | st.floats(0.0, 1.0)),
                "encoding": draw(st.sampled_from(["model", "int8", "int4"])),
            }
    return {
        "first_token": draw(st.sampled_from(["prefill", "decode"])),
        "prefill": {"blocks": prefill},
        "decode": {"blocks": decode},
        "kv_transfer": transfer,
    }


@given(plans())
def test_valid_plans_survive_a_round_trip(content):
    plan = parse(**content)
    again = PruningPlan.parse(plan.dumps())
    assert again == plan
    assert again.fingerprint == plan.fingerprint


def test_an_empty_plan_is_dense_and_needs_no_model():
    plan = PruningPlan.parse("{}")
    assert plan.is_empty
    assert plan.fingerprint == parse().fingerprint
    assert parse(decode={"blocks": {"2": "full"}}).is_empty
    assert not parse(first_token="decode").is_empty


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ({"kv": {"typo": 1}}, "unknown key `kv`"),
        ({"kv_transfer": {"3": {"frist": 1}}}, r"unknown key `kv_transfer\.3\.frist`"),
        ({"prefill": {"block": {}}}, r"unknown key `prefill\.block`"),
        (
            {"prefill": {"blocks": {"3": "removed"}}},
            "block 3: decode is full and attends, but prefill is removed",
        ),
        (
            {
                "prefill": {"blocks": {"3": "mlp_only"}},
                "decode": {"blocks": {"3": "attention_only"}},
            },
            "block 3",
        ),
        (
            {"decode": {"blocks": {"3": "kv_only"}}},
            r"decode\.blocks\.3: mode kv_only is not allowed",
        ),
        ({"decode": {"blocks": {"3": "mlp_and_kv"}}}, "not allowed in decode"),
        ({"decode": {"blocks": {"3": "gone"}}}, r"decode\.blocks\.3"),
        ({"decode": {"blocks": {"6": "removed"}}}, r"must lie in 0\.\.5"),
        ({"decode": {"blocks": {"-1": "removed"}}}, r"must lie in 0\.\.5"),
        ({"decode": {"blocks": {"x": "removed"}}}, r"decode\.blocks"),
        ({"kv_transfer": {"3": {"first": 0, "last": 0}}}, "at least one entry"),
        ({"kv_transfer": {"3": {"first": -1}}}, "at least 0"),
        ({"kv_transfer": {"3": {"first": 1.5}}}, r"between 0\.0 and 1\.0"),
        ({"kv_transfer": {"3": {"first": True}}}, "neither a count"),
        ({"kv_transfer": {"3": {"first": 1, "encoding": "int2"}}}, r"kv_transfer\.3\.encoding"),
        (
            {"kv_transfer": {"3": {"first": 1}}, "decode": {"blocks": {"3": "removed"}}},
            "needs no KV",
        ),
        ({"kv_transfer": {"9": {"first": 1}}}, r"must lie in 0\.\.5"),
        ({"first_token": "both"}, "first_token"),
        ({"version": 2}, "version"),
        ({"visual_tokens": {"num_keep": 0}}, "at least one visual token"),
        ({"model": {**SIGNATURE, "extra": 1}}, r"unknown key `model\.extra`"),
        ({"model": None, "decode": {"blocks": {"1": "removed"}}}, "names its model"),
    ],
)
def test_broken_rules_are_named(content, needle):
    with pytest.raises(PlanError, match=needle) as caught:
        parse(**content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("{", "not JSON"),
        ("[1]", "dictionary"),
        ('{"version": 1, "version": 1}', "stands twice"),
        ("NaN", "dictionary"),
    ],
)
def test_text_that_is_no_plan(text, needle):
    with pytest.raises(PlanError, match=needle):
        PruningPlan.parse(text)


def test_files(tmp_path):
    plan = parse(decode={"blocks": {"2": "removed"}})
    file = plan.save(tmp_path / "plan")
    assert PruningPlan.load(file) == PruningPlan.load(file.parent) == plan
    for broken in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PlanError, match="cannot be read"):
            PruningPlan.load(broken)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="UTF-8"):
        PruningPlan.load(file)


def test_fingerprint_sees_what_computes_and_nothing_else():
    plan = parse(decode={"blocks": {"2": "removed"}})
    spelled = parse(
        decode={"blocks": {"2": "removed", "4": "full"}},
        provenance={"seed": 3},
        kv_transfer={"1": {}},
    )
    assert plan.fingerprint == spelled.fingerprint
    assert plan.fingerprint != parse(decode={"blocks": {"3": "removed"}}).fingerprint
    assert (
        plan.fingerprint
        != parse(decode={"blocks": {"2": "removed"}}, kv_transfer={"1": {"last": 3}}).fingerprint
    )


def test_check_model_names_what_differs():
    plan = parse(decode={"blocks": {"2": "removed"}})
    plan.check_model(ModelSignature(**SIGNATURE))
    with pytest.raises(PlanError, match="num_blocks: plan 6, model 7") as caught:
        plan.check_model(ModelSignature(**{**SIGNATURE, "num_blocks": 7}))
    assert "hidden_size" not in str(caught.value)
    PruningPlan().check_model(ModelSignature(**SIGNATURE))


def test_a_fingerprint_of_the_first_scheme_says_how_to_renew_it():
    ours = {**SIGNATURE, "weights_fingerprint": "v2:4da7ee1a087caa0e41c1e"}
    with pytest.raises(PlanError, match="`rayapp plan renew DIR --model MODEL`") as refused:
        parse().check_model(ModelSignature(**ours))
    assert "\n" not in str(refused.value)
    assert "plan 'abc', model 'v2:4da7" in str(refused.value)
    with pytest.raises(PlanError, match="num_blocks") as refused:
        parse().check_model(ModelSignature(**{**ours, "num_blocks": 7}))
    assert "renew" not in str(refused.value)
    other = PruningPlan(model={**SIGNATURE, "weights_fingerprint": "v3:0"})
    with pytest.raises(PlanError, match="another model"):
        other.check_model(ModelSignature(**ours))


@given(
    st.integers(0, 300),
    st.integers(0, 40) | st.floats(0.0, 1.0),
    st.integers(1, 40) | st.floats(0.01, 1.0),
)
def test_counts_and_shares(num_entries, first, last):
    kept_first, kept_last = KVTransfer(first=first, last=last).counts(num_entries)
    want = [
        a if isinstance(a, int) else math.ceil(round(a * num_entries, 9)) for a in (first, last)
    ]
    if sum(want) >= num_entries:
        assert (kept_first, kept_last) == (num_entries, 0)
    else:
        assert [kept_first, kept_last] == want


def test_removals_count_parts_as_halves():
    plan = parse(
        prefill={
            "blocks": {"0": "kv_only", "1": "mlp_and_kv", "2": "attention_only", "3": "removed"}
        },
        decode={"blocks": {"3": "mlp_only"}},
    )
    assert plan.removed("prefill") == 1 + 0.5 + 0.5 + 1
    assert plan.removed("decode") == 0.5


@pytest.mark.parametrize(
    ("content", "only"),
    [
        ({}, False),
        ({"decode": {"blocks": {"3": "removed"}}}, True),
        ({"kv_transfer": {"1": {"encoding": "int8"}}}, True),
        ({"prefill": {"blocks": {"3": "kv_only"}}}, False),
        ({"visual_tokens": {"num_keep": 8}, "decode": {"blocks": {"3": "removed"}}}, False),
        ({"healed": 24 * "a", "decode": {"blocks": {"3": "removed"}}}, True),
        ({"healed": 24 * "a"}, False),
    ],
)
def test_plans_that_change_decode_alone(content, only):
    assert parse(**content).only_changes_decode == only


def test_healed_tensors_are_part_of_the_computation():
    plan = parse(decode={"blocks": {"3": "removed"}})
    healed = plan.with_healed("0" * 24)
    assert healed.fingerprint not in (plan.fingerprint, plan.with_healed("1" * 24).fingerprint)
    assert not parse(healed="0" * 24).is_empty
    assert PruningPlan.parse(healed.dumps()) == healed
    assert "healed" not in plan.dumps()
    with pytest.raises(PlanError, match="healed: String should match pattern"):
        parse(healed="../../weights")


def test_plans_from_before_healing_keep_their_fingerprint():
    assert parse(decode={"blocks": {"3": "removed"}}).fingerprint == "1f94680e8f43eb3a"
    assert PruningPlan().fingerprint == "16f2b7994dc2d339"


def test_an_encoding_brings_its_definition_into_the_fingerprint(monkeypatch):
    """Another number of entries per scale makes other tokens: the same rules, another plan."""
    cut, encoded = ({"3": {"first": 4, "last": 8, "encoding": e}} for e in ("model", "int8"))
    plans = [parse(kv_transfer=cut), parse(kv_transfer=encoded)]
    before = [plan.fingerprint for plan in plans]
    monkeypatch.setattr("rayapp.plan.KEY_GROUP", 32)
    assert plans[0].fingerprint == before[0] == "c956febf4fe016d2"
    assert plans[1].fingerprint != before[1]


def test_where_a_plan_lies_is_no_part_of_it(tmp_path):
    plan = parse(decode={"blocks": {"3": "removed"}})
    assert plan.directory is None
    plan.save(tmp_path)
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded.directory == tmp_path
    assert loaded == plan
    assert loaded.dumps() == plan.dumps()
    assert loaded.model_copy(update={"provenance": {}}).directory == tmp_path
    assert pickle.loads(pickle.dumps(loaded)).directory == tmp_path
    assert plan != parse()
