"""Costs: linear in counts, learned from steps, and what waits because of them."""

from __future__ import annotations

import random

import pytest

from rayapp.scaling.admission import Room, refusal
from rayapp.scaling.costs import DecodeCost, PrefillCost, pairs, prefill_work_s
from rayapp.scaling.fitting import NUM_COLD, LinearFit
from rayapp.scaling.meters import DecodeMeter, PrefillMeter
from rayapp.scaling.queueing import replicas_in_time, share_that_waits, share_too_late
from rayapp.scaling.reports import PrefillReport


def test_a_prompt_costs_the_same_in_any_chunks():
    cost = PrefillCost(token_s=1e-3, pair_s=1e-6)
    whole = cost.chunk_s(700)
    assert cost.chunk_s(300) + cost.chunk_s(400, 300) == pytest.approx(whole)
    assert pairs(3, 0) == 3


def test_work_counts_what_is_left():
    cost = PrefillCost(step_s=0.1, token_s=1e-3)
    assert prefill_work_s(cost, [(500, 0), (24, 1000)], chunk=512) == pytest.approx(0.2 + 0.524)
    assert prefill_work_s(cost, [], chunk=512) == 0.0


def test_the_largest_batch_within_a_step():
    cost = DecodeCost(step_s=0.02, row_s=0.001, entry_s=1e-6)
    batch = cost.largest_batch(0.05, 1000)
    assert cost.seconds(batch, batch * 1000) <= 0.05 < cost.seconds(batch + 1, (batch + 1) * 1000)
    assert cost.largest_batch(0.001, 1000) == 1


def test_a_fit_finds_the_costs_and_forgets_the_cold_start():
    true, rng = PrefillCost(step_s=0.03, token_s=4e-4, pair_s=2e-7), random.Random(0)
    meter = PrefillMeter(512)
    for _ in range(NUM_COLD):
        meter.observe([(512, 0)], 9.0)
    for _ in range(60):
        count, before = rng.randrange(1, 512), rng.randrange(0, 4000)
        meter.observe([(count, before)], true.step_s + true.chunk_s(count, before))
    for name, value in true:
        assert getattr(meter.cost, name) == pytest.approx(value, rel=0.02)


def test_a_fit_never_has_negative_costs():
    fit = LinearFit((1.0, 1.0))
    for count in range(1, 20):
        fit.observe((1.0, count), max(0.0, 1.0 - 0.05 * count))
    assert min(fit.coefficients) >= 0.0
    assert LinearFit((1.0,)).coefficients == (0.0,)


def test_meters_make_reports_that_travel():
    meter = PrefillMeter(512)
    for _ in range(9):
        meter.observe([(100, 0)], 0.1)
    meter.arrive(100)
    report = meter.report([(100, 0)], start_s=2.0)
    assert report.arrived_s == pytest.approx(report.queued_s) == pytest.approx(0.1, rel=0.01)
    assert PrefillReport.read(report.numbers()) == report
    assert PrefillReport.read({"queued_s": 1.0}) is None
    assert PrefillReport.read({**report.numbers(), "token_s": float("nan")}) is None
    decode = DecodeMeter()
    for rows in (1, 2, 4, 8, 16) * 8:
        decode.observe(rows, 100 * rows * (rows % 3 + 1), 0.02 + 0.001 * rows)
    assert decode.cost.seconds(10, 1000) == pytest.approx(0.03, rel=0.05)


def test_erlang_against_known_values():
    assert share_that_waits(0.5, 1) == pytest.approx(0.5)  # one server: the load itself
    assert share_that_waits(2.0, 3) == pytest.approx(4 / 9)
    assert share_that_waits(3.0, 3) == 1.0
    assert share_that_waits(0.0, 1) == 0.0


def test_waits_against_a_simulated_queue():
    """Poisson arrivals of exponential work at three servers, one queue."""
    rng, load, servers, mean_s = random.Random(2), 2.2, 3, 1.0
    free, now, late, count, limit_s = [0.0] * servers, 0.0, 0, 100_000, 2.0
    for _ in range(count):
        now += rng.expovariate(load / mean_s)
        first = min(range(servers), key=free.__getitem__)
        begin = max(now, free[first])
        free[first] = begin + rng.expovariate(1 / mean_s)
        late += begin - now > limit_s
    assert share_too_late(load, servers, mean_s, 1.0, limit_s) == pytest.approx(
        late / count, rel=0.15
    )


def test_replicas_in_time():
    few = replicas_in_time(2.0, 1.0, 1.0, 10.0, late=0.01, usage=0.9)
    many = replicas_in_time(2.0, 1.0, 1.0, 0.1, late=0.01, usage=0.9)
    assert 3 <= few < many
    assert replicas_in_time(0.0, 1.0, 1.0, 1.0, late=0.01, usage=0.9) == 1


def test_admission():
    room = Room(10, queue_s=30.0)
    assert refusal(room, 9) is None
    assert "10 requests are waiting" in refusal(room, 10)[0]
    assert refusal(room, 0, 1, {"prefill": 29.0, "decode": 30.0}) is None
    text, again_s = refusal(room, 0, 1, {"prefill": 42.0, "decode": 31.0})
    assert "42.0 s of prefill wait" in text
    assert "more prefill replicas" in text
    assert again_s == 12
    assert "of decode wait" in refusal(room, 0, 1, {"prefill": 2.0, "decode": 31.0})[0]
