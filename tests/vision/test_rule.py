"""A plan's rule decides how images share a budget."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayapp.errors import PlanError
from rayapp.plan import PruningPlan

SIGNATURE = {
    "model_type": "llava",
    "num_blocks": 6,
    "hidden_size": 64,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "weights_fingerprint": "abc",
}


def parse(**rule: Any) -> PruningPlan:
    return PruningPlan.parse(json.dumps({"model": SIGNATURE, "visual_tokens": rule}))


def test_plans_from_before_sharing_keep_their_fingerprint() -> None:
    assert parse(num_keep=64, num_aligned=0.8).fingerprint == "f9ae7cba10d6ff87"
    equal = parse(num_keep=64, num_aligned=0.8, sharing="equal")
    assert equal == parse(num_keep=64, num_aligned=0.8)
    assert equal.fingerprint == "f9ae7cba10d6ff87"


def test_sharing_by_diversity_is_another_plan_and_survives_a_round_trip() -> None:
    plan = parse(num_keep=64, sharing="diversity")
    assert plan.visual_tokens is not None
    assert plan.visual_tokens.sharing == "diversity"
    assert plan.fingerprint != parse(num_keep=64).fingerprint
    again = PruningPlan.parse(plan.dumps())
    assert (again, again.fingerprint) == (plan, plan.fingerprint)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"num_keep": 4, "sharing": "random"}, r"visual_tokens\.sharing.*'equal' or 'diversity'"),
        ({"num_keep": 4, "sharin": "equal"}, r"unknown key `visual_tokens\.sharin`"),
    ],
)
def test_what_is_no_way_to_share_is_refused(rule: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        parse(**rule)
