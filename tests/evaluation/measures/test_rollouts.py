"""Generation along dense answers: positions, agreement, repetition."""

from __future__ import annotations

import pytest
import torch

from rayapp.engine.local import LocalPipeline
from rayapp.evaluation.measures.likelihood import TwoStages
from rayapp.evaluation.measures.rollouts import (
    Rollout,
    position_bins,
    repetition,
    roll_out,
    rollout_result,
)
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.blocks import signature_of
from rayapp.plan import Mode, PruningPlan, StagePlan

PROMPTS = [(5, 9, 31, 7), (8, 8, 2), (101, 55, 13, 77, 4)]


def rolled(model, plan: PruningPlan, max_tokens: int = 12) -> list[Rollout]:
    dense, other = (LocalPipeline(model, plan=side) for side in (PruningPlan(), plan))
    sides = TwoStages(model, PruningPlan()), TwoStages(model, plan)
    return roll_out(dense, other, sides, PROMPTS, max_tokens=max_tokens)


def test_the_empty_plan_agrees_everywhere_and_says_the_same(tiny_model):
    model = tiny_model("llama")
    for prompt, rollout in zip(PROMPTS, rolled(model, PruningPlan()), strict=True):
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert list(rollout.dense) == greedy[0, len(prompt) :].tolist()
        assert rollout.is_same
        assert all(rollout.agrees)
        assert max(map(abs, rollout.kl)) < 1e-9
        assert rollout.num_same == len(rollout.dense)


def test_a_cut_plan_is_compared_along_the_dense_answer(tiny_model):
    model = tiny_model("llama")
    plan = PruningPlan(
        model=signature_of(model), decode=StagePlan(blocks=dict.fromkeys((1, 2, 3), Mode.REMOVED))
    )
    rollouts = rolled(model, plan)
    assert [r.dense for r in rollouts] == [r.dense for r in rolled(model, PruningPlan())]
    for rollout in rollouts:
        assert len(rollout.kl) == len(rollout.agrees) == len(rollout.dense)
        assert rollout.kl[0] == pytest.approx(0, abs=1e-9)  # prefill, which is whole, makes it
        assert max(rollout.kl) > 1e-6
    row = rollout_result("mine", "plain", rollouts, EvaluationSettings(), by_prefill=True)
    assert row.num_tokens == sum(len(r.dense) for r in rollouts)
    assert row.decode_share == 1 - len(rollouts) / row.num_tokens
    assert sum(part.num_tokens for part in row.bins) == row.num_tokens
    assert sum(part.num_tokens * part.kl for part in row.bins) / row.num_tokens == pytest.approx(
        row.kl.mean
    )


def test_bins_grow_fourfold():
    rollouts = [Rollout((1,) * 9, (1,) * 9, tuple(map(float, range(9))), (True,) * 8 + (False,))]
    assert [(b.first, b.last) for b in position_bins(rollouts)] == [
        (0, 0),
        (1, 3),
        (4, 8),
    ]
    assert position_bins(rollouts)[1].kl == (1 + 2 + 3) / 3
    assert position_bins(rollouts)[-1].agreement == 0.8


def test_a_single_token_has_a_bin():
    (only,) = position_bins([Rollout((1,), (2,), (0.5,), (False,))])
    assert (only.first, only.last, only.kl) == (0, 0, 0.5)


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([7] * 13) == pytest.approx(0.9)
    assert repetition([1, 2]) == 0.0
