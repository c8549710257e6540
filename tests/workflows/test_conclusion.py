"""The two lines that end the demo say what was measured, whatever came out."""

from __future__ import annotations

import pytest

from rayapp.evaluation.bootstrap import Bound
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.result import (
    EvaluationResult,
    LatencyResult,
    PlanSummary,
    StageTimes,
    TaskResult,
)
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.checkpoint import Checkpoint
from rayapp.plan import ModelSignature, PruningPlan
from rayapp.workflows.conclusion import conclude

HERE = this_machine(device="cpu", num_threads=1)
PERFECT = {"add": (1.0, 1.0), "sort": (1.0, 1.0)}


@pytest.fixture(scope="module")
def signature(testbed_path) -> ModelSignature:
    return Checkpoint(testbed_path).signature()


@pytest.fixture
def plan(signature) -> PruningPlan:
    modes = {"prefill": {"5": "removed"}, "decode": {"2": "removed", "5": "removed"}}
    stages = {stage: {"blocks": blocks} for stage, blocks in modes.items()}
    return PruningPlan.model_validate({"model": signature.model_dump(), **stages})


def task(name: str, dense: float, plan: float, nll=(0.01, 0.01)) -> TaskResult:
    bound = Bound(mean=0.0, upper=0.0, num_examples=100)
    return TaskResult(
        task=name, num_examples=100, min_prompt_tokens=40, max_prompt_tokens=400,
        bytes_full=120, bytes_sent=100, overhead_bytes=0, num_tokens=500, mean_prompt_tokens=200,
        dense_nll=nll[0], plan_nll=nll[1], kl=bound, dense_exact_match=dense,
        plan_exact_match=plan, points_lost=bound,
    )  # fmt: skip


@pytest.fixture
def evaluation(signature):
    def made(matches, *, nll=(0.01, 0.01), prefill=(8.0, 8.0), token=(2.4, 2.4)):
        means = [sum(values) / len(matches) for values in zip(*matches.values(), strict=True)]
        dense, plan = (
            StageTimes(prefill_ms=p, tpot_ms=t, answer_ms=p + 63 * t)
            for p, t in zip(prefill, token, strict=True)
        )
        timing = LatencyResult(
            num_prompt_tokens=128, num_answer_tokens=64, batch_size=1, num_runs=10, num_threads=1,
            dense=dense, plan=plan,
        )  # fmt: skip
        return EvaluationResult(
            model=signature, dtype="bfloat16", settings=EvaluationSettings(), data=(),
            plan=PlanSummary(fingerprint="", is_empty=False, prefill_removed=1, decode_removed=2),
            tasks=tuple(task(name, *values) for name, values in matches.items()),
            mean=task("mean", *means, nll=nll), latency=(timing,), machine=HERE,
        )  # fmt: skip

    return made


def ledger(factor: float | None) -> dict:
    return {"totals": {"reduction_factor": factor}, "links": [], "recent": []}


def test_what_a_plan_gains_and_costs(plan, evaluation):
    matches = {"add": (1.0, 1.0), "copy": (1.0, 0.99), "sort": (1.0, 0.96)}
    measured = evaluation(matches, nll=(0.0003, 0.0113), prefill=(7.88, 7.27), token=(2.46, 2.05))
    assert conclude(plan, measured, ledger(1.1978)) == (
        "Gained: prefill runs 11 of 12 blocks and decode 10, a prompt takes 1.08 times less time, "
        "a token takes 1.20 times less time, a prompt's KV weighs 1.20 times less on the wire.",
        "Cost: exact match falls from 100 to 98.3 % on average, most in sort (100 to 96), "
        "the answers' NLL rises from 0.0003 to 0.0113 nats a token.",
    )


def test_what_got_slower_or_heavier_is_a_cost(evaluation):
    measured = evaluation(PERFECT, prefill=(8.0, 10.0), token=(2.0, 2.5))
    assert conclude(PruningPlan(), measured, ledger(0.98)) == (
        "Gained: nothing that was measured.",
        "Cost: a prompt takes 1.25 times as long, a token takes 1.25 times as long, "
        "a prompt's KV weighs 1.02 times as much on the wire.",
    )


def test_differences_that_do_not_show_are_none(plan, evaluation):
    measured = evaluation(PERFECT, nll=(0.01, 0.010001), prefill=(8.0, 8.01), token=(2.4, 2.399))
    assert conclude(plan, measured, ledger(None)) == (
        "Gained: prefill runs 11 of 12 blocks and decode 10.",
        "Cost: nothing that was measured; no task's exact match falls.",
    )


@pytest.mark.parametrize(
    ("matches", "gained", "cost"),
    [
        ({"sort": (1.0, 0.9)}, "", "exact match falls from 100 to 90 % on average"),
        (
            {"add": (0.9, 0.9), "sort": (1.0, 0.9)},
            "",
            "exact match falls from 95 to 90 % on average, all of it in sort (100 to 90)",
        ),
        (
            {"add": (0.9, 1.0), "sort": (1.0, 0.95)},
            "exact match rises from 95 to 97.5 % on average",
            "exact match falls in sort (100 to 95)",
        ),
        (
            {"add": (0.9, 1.0), "sort": (1.0, 0.95), "copy": (1.0, 0.95)},
            "",
            "exact match falls in sort (100 to 95) and copy (100 to 95)",
        ),
    ],
)
def test_quality_is_told_by_average_and_worst_task(evaluation, matches, gained, cost):
    told = conclude(PruningPlan(), evaluation(matches), ledger(None))
    assert told.gained == f"Gained: {gained or 'nothing that was measured'}."
    assert told.cost == f"Cost: {cost}."
