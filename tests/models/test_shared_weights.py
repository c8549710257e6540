"""Whether decode's weights suffice for prefill, plan by plan."""

from __future__ import annotations

import pytest
import torch

from rayapp.models.blocks import signature_of
from rayapp.models.healed import HealedWeights
from rayapp.models.shared_weights import lack_in_decode
from rayapp.plan import PruningPlan


@pytest.mark.parametrize(
    ("prefill", "decode", "lack"),
    [
        ({}, {}, None),
        ({1: "kv_only", 3: "mlp_and_kv"}, {}, None),
        ({1: "removed"}, {1: "removed"}, None),
        ({1: "attention_only"}, {}, None),
        ({4: "mlp_only"}, {4: "mlp_only"}, None),
        ({}, {2: "removed"}, "block 2 is full in prefill and removed in decode"),
        ({}, {1: "attention_only"}, "block 1 is full in prefill and attention_only in decode"),
        (
            {1: "mlp_and_kv"},
            {1: "mlp_only"},
            "block 1 is mlp_and_kv in prefill and mlp_only in decode",
        ),
    ],
)
def test_decode_must_hold_what_prefill_runs(tiny_model, prefill, decode, lack):
    signature = signature_of(tiny_model("llama")).model_dump()
    stages = {"prefill": {"blocks": prefill}, "decode": {"blocks": decode}, "model": signature}
    assert lack_in_decode(PruningPlan.model_validate(stages), 5) == lack


@pytest.mark.parametrize(
    ("stage", "block", "lack"),
    [
        ("decode", 1, None),
        ("decode", 2, "layers.2.mlp.up_proj.weight is healed in decode, and prefill runs it too"),
        ("prefill", 2, "prefill has 1 healed tensors of its own"),
    ],
)
def test_healed_tensors_may_be_those_of_blocks_that_prefill_misses(
    tmp_path, tiny_model, stage, block, lack
):
    model = tiny_model("llama")
    tensors = {f"layers.{block}.mlp.up_proj.weight": torch.ones(2, 2)}
    healed = HealedWeights.of({stage: tensors})
    healed.save(tmp_path)
    plan = PruningPlan.model_validate(
        {
            "prefill": {"blocks": {1: "removed"}},
            "decode": {"blocks": {1: "removed"}},
            "model": signature_of(model).model_dump(),
        }
    )
    plan.with_healed(healed.digest).save(tmp_path)
    assert lack_in_decode(PruningPlan.load(tmp_path), 5) == lack
