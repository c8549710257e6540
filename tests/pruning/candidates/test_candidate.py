from __future__ import annotations

import itertools
import json

import pytest

from rayapp.plan import KVTransfer, Mode, ModelSignature
from rayapp.pruning.candidates.candidate import DENSE, Candidate, kv_rule, transfer_of

MODEL = ModelSignature(
    model_type="llama", num_blocks=3, hidden_size=8, num_kv_heads=1, head_dim=8, vocab_size=9,
    weights_fingerprint="f",
)  # fmt: skip


@pytest.mark.parametrize(
    ("candidate", "prefill", "decode"),
    [
        (DENSE, {}, {}),
        (Candidate((2, 3), ()), {1: Mode.KV_ONLY}, {}),
        (Candidate((2, 3), (2, 3)), {1: Mode.REMOVED}, {1: Mode.REMOVED}),
        (Candidate((2, 3), (3,)), {1: Mode.KV_ONLY}, {1: Mode.ATTENTION_ONLY}),
        (Candidate((2, 3), (2,)), {1: Mode.REMOVED}, {1: Mode.MLP_ONLY}),
        (Candidate((2,), ()), {1: Mode.MLP_AND_KV}, {}),
        (Candidate((2,), (2,)), {1: Mode.MLP_ONLY}, {1: Mode.MLP_ONLY}),
        (Candidate((3,), (2, 3)), {1: Mode.ATTENTION_ONLY}, {1: Mode.REMOVED}),
        (Candidate((), (0, 1, 5)), {}, {0: Mode.REMOVED, 2: Mode.ATTENTION_ONLY}),
    ],
)
def test_kv_modes_follow_from_where_decode_attends(candidate, prefill, decode):
    plan = candidate.plan(MODEL)
    assert plan.prefill.blocks == prefill
    assert plan.decode.blocks == decode


def test_every_candidate_is_a_valid_plan_and_comes_back():
    sets = [s for n in range(3) for s in itertools.combinations(range(6), n)]
    plans = {}
    for prefill, decode in itertools.product(sets, sets):
        candidate = Candidate(prefill, decode)
        plan = candidate.plan(MODEL)  # the plan's own rules are compared here
        assert Candidate.from_plan(plan) == candidate
        assert plan.removed("prefill") == candidate.removed("prefill") == len(prefill) / 2
        assert plan.removed("decode") == candidate.removed("decode") == len(decode) / 2
        plans[plan.fingerprint] = candidate
    assert len(plans) == len(sets) ** 2


def test_transfer_rules_go_with_the_kv():
    rules = {0: KVTransfer(first=1), 1: KVTransfer(encoding="int8")}
    plan = Candidate((), (2, 3)).plan(MODEL, kv_transfer=rules)
    assert plan.kv_transfer == {0: rules[0]}


def test_words_for_people():
    assert str(Candidate((0, 1, 3), (4,))) == "prefill[0 1.mlp] decode[2.attention]"
    assert str(DENSE) == "prefill[] decode[]"


def test_ties_go_to_the_smaller_encoding():
    assert sorted([Candidate((), (2,)), Candidate((0,), ()), Candidate((), (0, 1))]) == [
        Candidate((), (0, 1)),
        Candidate((), (2,)),
        Candidate((0,), ()),
    ]


@pytest.mark.parametrize(
    ("rule", "spelled"),
    [
        (KVTransfer(first=4, last=0.25), (1, "4", "0.25", "model")),
        (KVTransfer(last=3, encoding="int8"), (1, "0", "3", "int8")),
        (KVTransfer(first=1), (1, "1", "0", "model")),
        (KVTransfer(first=1.0), (1, "all", "0", "model")),
        (KVTransfer(first=0.0, last=1), (1, "0", "1", "model")),
        (KVTransfer(encoding="int4"), (1, "all", "0", "int4")),
    ],
)
def test_a_transfer_rule_is_spelled_in_one_way(rule, spelled):
    assert kv_rule(1, rule) == spelled
    assert kv_rule(1, transfer_of(spelled)) == spelled
    for entries in (0, 1, 2, 7, 100):
        assert transfer_of(spelled).counts(entries) == rule.counts(entries)


def test_own_rules_replace_the_default_ones_and_reach_the_plan():
    rules = {0: KVTransfer(first=1), 1: KVTransfer(encoding="int8"), 2: KVTransfer(last=1.0)}
    candidate = Candidate((), (2, 3)).with_kv(rules)
    assert candidate.kv == ((0, "1", "0", "model"),)  # decode reads no KV in 1; all of 2 travels
    plan = candidate.plan(MODEL, kv_transfer={2: KVTransfer(encoding="int4")})
    assert plan.kv_transfer == {0: KVTransfer(first=1, last=0)}
    assert Candidate.from_plan(plan) == candidate
    assert str(candidate) == "prefill[] decode[1] kv[0:1+0]"
    assert DENSE.with_kv({}) == DENSE.with_kv({0: KVTransfer()}) == DENSE


def test_candidates_with_rules_sort_and_travel_as_json():
    amounts = (KVTransfer(), KVTransfer(first=4, last=0.5), KVTransfer(last=3, encoding="int8"))
    sets = [DENSE.with_kv({0: a, 1: b}) for a in amounts for b in amounts]
    assert len(set(sets)) == 9
    assert sorted(sets)[0] == DENSE
    back = json.loads(json.dumps([candidate.kv for candidate in sets]))
    assert [tuple(tuple(rule) for rule in kv) for kv in back] == [c.kv for c in sets]
