"""Timings: interleaving, medians, and that the engines really answer."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from rayapp.errors import InputError
from rayapp.evaluation.measures import latency
from rayapp.evaluation.measures.latency import RunTimes, interleave, measure_latency, medians
from rayapp.evaluation.measures.likelihood import TwoStages
from rayapp.evaluation.result import LatencyResult, StageTimes
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.blocks import signature_of
from rayapp.plan import Mode, PruningPlan, StagePlan


def test_sides_alternate_and_warm_up_is_dropped():
    calls: list[str] = []
    clock = itertools.count()

    def side(name: str):
        def run() -> RunTimes:
            calls.append(name)
            return RunTimes(float(next(clock)), 0.0)

        return run

    dense, plan = interleave(side("dense"), side("plan"), 3)
    assert calls == ["dense", "plan", "dense", "plan", "plan", "dense", "dense", "plan"]
    assert [run.prefill_s for run in dense] == [2.0, 5.0, 6.0]
    assert [run.prefill_s for run in plan] == [3.0, 4.0, 7.0]


def test_an_answer_is_prefill_and_n_minus_one_steps():
    runs = [RunTimes(0.010, 0.001), RunTimes(0.020, 0.003), RunTimes(0.500, 0.002)]
    times = medians(runs, num_answer_tokens=11)
    assert times.prefill_ms == pytest.approx(20.0)
    assert times.tpot_ms == pytest.approx(2.0)
    assert times.answer_ms == pytest.approx(50.0)  # of 20, 50, 520: not 20 + 10 x 2


def test_speedups_are_dense_over_plan():
    result = LatencyResult(
        num_prompt_tokens=8,
        num_answer_tokens=4,
        batch_size=1,
        num_runs=30,
        num_threads=1,
        dense=StageTimes(prefill_ms=6, tpot_ms=2, answer_ms=12),
        plan=StageTimes(prefill_ms=3, tpot_ms=1.6, answer_ms=8),
    )
    assert (result.ttft_speedup, result.tpot_speedup, result.speedup) == (2.0, 1.25, 1.5)


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_engines_are_timed(tiny_model, first_token, batch_size):
    model = tiny_model("llama")
    removed = StagePlan(blocks={2: Mode.REMOVED, 3: Mode.REMOVED})
    plan = PruningPlan(
        model=signature_of(model), first_token=first_token, prefill=removed, decode=removed
    )
    settings = EvaluationSettings(num_runs=2, num_prompt_tokens=10, num_answer_tokens=5)
    seen = []
    result = measure_latency(
        TwoStages(model, PruningPlan()),
        TwoStages(model, plan),
        settings,
        batch_size=batch_size,
        progress=lambda what, done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert (result.batch_size, result.num_runs) == (batch_size, 2)
    assert result.num_threads == torch.get_num_threads()
    for side in (result.dense, result.plan):
        assert side.prefill_ms > 0
        assert side.answer_ms > side.prefill_ms


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_the_clock_is_the_one_that_was_asked_for(tiny_model, monkeypatch, clock):
    ticks = iter(range(10_000))
    monkeypatch.setitem(latency.CLOCKS, clock, lambda: next(ticks) * 0.5)
    sides = [TwoStages(tiny_model("llama"), PruningPlan()) for _ in range(2)]
    settings = EvaluationSettings(
        num_runs=2, num_prompt_tokens=10, num_answer_tokens=5, clock=clock
    )
    result = measure_latency(*sides, settings, batch_size=1)
    assert result.clock == clock
    assert result.dense.prefill_ms == result.plan.prefill_ms == 500, "one tick between two looks"
    assert result.dense.tpot_ms == 500 / 4


def test_the_cpu_s_clock_times_one_thread():
    with pytest.raises(ValidationError, match="clock=cpu with num_threads=2"):
        EvaluationSettings(clock="cpu", num_threads=2)


def test_the_cpu_s_clock_times_no_gpu(tiny_model, monkeypatch):
    side = TwoStages(tiny_model("llama"), PruningPlan())
    monkeypatch.setattr(type(side.prefill), "device", torch.device("cuda"))
    with pytest.raises(InputError, match="clock=cpu with a model on cuda"):
        measure_latency(side, side, EvaluationSettings(clock="cpu"), batch_size=1)
