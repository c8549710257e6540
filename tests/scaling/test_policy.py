"""Decisions about pools, from reports that a test makes up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayapp.scaling.memory import Level, Rates
from rayapp.scaling.need import decode_need, entries_ahead, steady_step_s
from rayapp.scaling.policy import Memory, decide
from rayapp.scaling.reports import IngressReport
from rayapp.scaling.view import Heard, PoolView
from tests.scaling.conftest import QUIET_DECODE, Service


def run(service, settings, seconds, each, memory=None):
    """Decide every second, as Serve does; the decisions of the last one and the memory."""
    memory, decisions = memory or Memory(), {}
    for _ in range(seconds):
        each(service)
        decisions, memory = decide(settings, memory, service.view(), service.now_s)
        for name, decision in decisions.items():
            service.targets[name] = decision.after
    return decisions, memory


def test_four_busy_replicas_without_a_queue_are_kept(service, settings):
    """The fault of policies that look at queues: nobody waits, and all of them work."""
    service.targets["prefill"] = 4
    run(service, settings, 60, lambda s: s.prompts(6.0, queued_s=0.3))  # 3 s of work per second
    assert service.targets["prefill"] >= 4


def test_prefill_follows_the_work_that_arrives(service, settings):
    sizes = []
    for per_s in (0.5, 2.0, 6.0, 12.0):
        run(service, settings, 40, lambda s, rate=per_s: s.prompts(rate))
        sizes.append(service.targets["prefill"])
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] >= 7


def test_work_that_waits_is_a_reason_and_is_told_in_seconds(service, settings):
    service.targets["prefill"] = 2
    decisions, _ = run(service, settings, 1, lambda s: s.prompts(0.1, queued_s=60.0))
    assert decisions["prefill"].after > 2
    assert "60.0 s of work against a target of 1.5 s" in str(decisions["prefill"])
    assert str(decisions["prefill"]).startswith("prefill 2 -> ")


def test_work_that_is_done_before_a_replica_would_be_ready_starts_none(service, settings):
    service.targets["prefill"] = 2
    patient = settings.model_copy(update={"cold_start_s": 30.0})
    decisions, _ = run(service, patient, 1, lambda s: s.prompts(0.1, queued_s=10.0))
    assert decisions["prefill"].after == 2


def test_prompts_that_wait_in_the_ingress_count(service, settings):
    service.ingress = IngressReport(waiting_tokens=100_000, sent=0, sent_s=0)  # 100 s of work
    decisions, _ = run(service, settings, 1, lambda s: s.prompts(0.1))
    assert decisions["prefill"].after > 1


def test_the_link_is_a_stage_of_its_own(service, settings):
    def each(s):
        s.prompts(0.1)
        s.ingress = replace(s.ingress, sent=s.ingress.sent + 1, sent_s=s.ingress.sent_s + 2.5)

    decisions, _ = run(service, settings, 5, each)
    assert service.targets["prefill"] == 3
    assert "links are busy" in decisions["prefill"].reason


@pytest.mark.parametrize(
    ("rows", "waiting", "size"), [(2, 0, 1), (6, 0, 1), (12, 0, 2), (14, 24, 5)]
)
def test_decode_follows_the_step_time(service, settings, rows, waiting, size):
    """A step of 11 sequences takes 45 ms, nine tenths of the target; a margin is kept."""
    service.decode = replace(
        service.decode, rows=rows, waiting=waiting, entries=rows * 100, row_s=0.0021
    )
    run(service, settings, 1, lambda s: None)
    assert service.targets["decode"] == size


def test_uneven_sequences_leave_a_larger_margin(settings):
    """Long entries of few sequences make steps differ; many short ones even out."""
    report = replace(QUIET_DECODE, rows=8, entries=8000, step_s=0.01)
    even = replace(report, row_s=0.004, entry_s=0.0)
    uneven = replace(report, row_s=0.0, entry_s=4e-6)
    assert steady_step_s(even, settings, 1000) == pytest.approx(0.045)
    assert 0.025 < steady_step_s(uneven, settings, 1000) < 0.04
    patient = settings.model_copy(update={"attainment": 0.9})
    assert steady_step_s(uneven, patient, 1000) > steady_step_s(uneven, settings, 1000)


def test_sequences_that_become_longer_are_foreseen_and_chance_is_not():
    steady = Level(now=1100.0, fast=1050.0, slow=1000.0, per_s=20.0)
    assert entries_ahead(steady, num_sequences=100, cold_s=10.0) == 1100.0
    longer = Level(now=2200.0, fast=1800.0, slow=1000.0, per_s=50.0)
    assert entries_ahead(longer, num_sequences=100, cold_s=10.0) == 2700.0
    assert entries_ahead(longer, num_sequences=3, cold_s=10.0) == 2200.0


@pytest.mark.parametrize(("per_s", "more"), [(1.0, True), (-1.0, False)])
def test_longer_sequences_need_more_replicas_unless_the_short_ones_just_ended(
    settings, per_s, more
):
    report = replace(QUIET_DECODE, rows=40, entries=40 * 1000, entry_s=4e-6, row_s=0.0005)
    level = Level(now=40.0, fast=40.0, slow=40.0, per_s=per_s)
    steady = Level(now=1000.0, fast=1000.0, slow=1000.0, per_s=0.0)
    longer = replace(steady, fast=1400.0, per_s=50.0)
    needs = [
        decode_need([report], level, Rates(), settings, cold_s=10.0, sizes=sizes)
        for sizes in (steady, longer)
    ]
    assert (needs[1].least > needs[0].least) == more


def test_pages_limit_what_a_replica_carries(service, settings):
    service.decode = replace(service.decode, rows=4, entries=300_000, entry_s=0.0)
    run(service, settings, 1, lambda s: None)
    assert service.targets["decode"] == 1
    service.decode = replace(service.decode, rows=12, entries=900_000)
    run(service, settings, 1, lambda s: None)
    assert service.targets["decode"] == 2


def test_a_target_that_nothing_meets_does_not_take_every_replica(service, settings):
    service.decode = replace(service.decode, rows=4, entries=400, step_s=0.4, row_s=0.01)
    run(service, settings, 5, lambda s: None)
    assert service.targets["decode"] == 1


def test_a_pool_shrinks_once_less_was_enough_for_the_whole_delay(service, settings):
    _, memory = run(service, settings, 30, lambda s: s.prompts(8.0))
    high = service.targets["prefill"]
    assert high > 4
    _, memory = run(service, settings, 15, lambda s: s.prompts(0.5), memory)
    assert service.targets["prefill"] == high
    run(service, settings, 60, lambda s: s.prompts(0.5), memory)
    assert service.targets["prefill"] == 1


def test_no_step_is_larger_than_allowed(service, settings):
    decisions, _ = run(service, settings, 1, lambda s: s.prompts(0.1, queued_s=500.0))
    assert decisions["prefill"].after == 1 + settings.largest_step


def test_a_load_that_wavers_does_not_move_the_pools(service, settings):
    """Twice as much and half as much in turns, quicker than the delay: one size for all of it."""
    memory, sizes = Memory(), []
    for number in range(60):
        _, memory = run(
            service, settings, 5, lambda s, n=number: s.prompts(2 + 4 * (n % 2)), memory
        )
        sizes.append(service.targets["prefill"])
    assert len(set(sizes[10:])) == 1


def test_where_nobody_reports_everything_stays(service, settings):
    service.targets.update(prefill=3, decode=3)
    service.silent = {f"{pool}-{n}" for pool in ("prefill", "decode") for n in range(8)}
    decisions, _ = run(service, settings, 60, lambda s: s.prompts(50.0, queued_s=100.0))
    assert (service.targets["prefill"], service.targets["decode"]) == (3, 3)
    assert decisions["prefill"].reason == "no replica reports"


def test_a_silent_replica_holds_shrinking_and_not_growing(service, settings):
    service.targets["prefill"] = 3
    service.silent = {"prefill-0"}
    _, memory = run(service, settings, 60, lambda s: s.prompts(0.5))
    assert service.targets["prefill"] == 3
    run(service, settings, 20, lambda s: s.prompts(9.0), memory)
    assert service.targets["prefill"] > 3


def test_a_silent_replica_counts_as_the_fullest(settings):
    """Of three that report, two have just started: the silent one is as full as the third."""
    names = ("silent", "old", "new", "newer")
    rows = dict(zip(names, (15, 15, 0, 0), strict=True))
    memory, before = Memory(), {}
    for now_s in (1000.0, 1000.0 + 2 * settings.stale_s):
        heard = {
            name: Heard(now_s, decode=replace(QUIET_DECODE, rows=count, entries=100 * count))
            for name, count in rows.items()
            if now_s == 1000.0 or name != "silent"
        }
        before |= heard
        view = {"decode": PoolView(1, 8, 4, names, dict(before))}
        _, memory = decide(settings, memory, view, now_s)
    assert memory.of("answers").levels[-1][1] == pytest.approx(30)


@pytest.mark.parametrize(("rows", "size"), [(8.6, 20), (7.0, 16)])
def test_a_pool_that_is_a_little_too_large_is_left_alone(service, settings, rows, size):
    """Of twenty replicas, 19 would be enough, or 16."""
    service.bounds["decode"], service.targets["decode"] = (1, 30), 20
    service.decode = replace(QUIET_DECODE, rows=rows, entries=100 * rows, row_s=0.0021)
    memory, seconds = Memory(), 0
    while service.targets["decode"] == 20 and seconds < 60:
        _, memory = run(service, settings, 1, lambda s: None, memory)
        seconds += 1
    assert service.targets["decode"] == size


def test_stale_reports_count_as_none(service, settings):
    service.targets["prefill"] = 3
    _, memory = run(service, settings, 2, lambda s: s.prompts(0.5))
    service.silent = {f"prefill-{n}" for n in range(8)}
    decisions, _ = run(service, settings, 60, lambda s: None, memory)
    assert decisions["prefill"].reason == "no replica reports"
    assert service.targets["prefill"] == 3


def test_pools_of_fixed_size_join(settings):
    service = Service(prefill=(2, 2))
    decisions, _ = run(service, settings, 5, lambda s: s.prompts(50.0, queued_s=100.0))
    assert decisions["prefill"].after == 2
    assert decisions["ingress"].after == 1


def test_ratios_add_replicas_and_take_none(service, settings):
    bound = settings.model_copy(update={"most_ratio": 2.0, "least_ratio": 1.0})
    run(service, bound, 40, lambda s: s.prompts(8.0))
    assert service.targets["decode"] >= service.targets["prefill"] / 2
    other = Service()
    other.decode = replace(other.decode, rows=60, entries=6000)
    run(other, bound, 3, lambda s: s.prompts(0.1))
    assert other.targets["prefill"] == other.targets["decode"] > 1


def test_unified_replicas_need_room_for_both(settings):
    service = Service()
    del service.bounds["prefill"], service.bounds["decode"]
    service.bounds["unified"], service.targets["unified"] = (1, 8), 1
    memory = Memory()
    for _ in range(20):
        service.prompts(3.0)
        service.now_s += 1.0
        decode = replace(service.decode, rows=20, entries=2000)
        heard = {"u": Heard(service.now_s, prefill=service.prefill, decode=decode)}
        view = {"unified": PoolView(1, 8, 1, ("u",), heard)}
        decisions, memory = decide(settings, memory, view, service.now_s)
    assert decisions["unified"].after >= 4  # 1.5 replicas of prefill, and 1.4 of decode


def test_decisions_ten_times_a_second_fill_no_memory(service, settings):
    memory, view = Memory(), service.view()
    for number in range(300):
        _, memory = decide(settings, memory, view, service.now_s + number / 10)
    assert len(memory.of("decode").enough) <= 31
    assert len(memory.of("answers").levels) <= 31


def test_a_cold_start_is_measured_from_the_decision(service, settings):
    memory = Memory()
    service.prompts(0.1, queued_s=500.0)
    decisions, memory = decide(settings, memory, service.view(), service.now_s)
    grown = decisions["prefill"].after
    assert grown > 1
    for _ in range(7):  # The replicas are not there yet.
        view = service.view()
        view["prefill"] = replace(view["prefill"], target=grown)
        _, memory = decide(settings, memory, view, service.now_s)
    service.targets["prefill"] = grown
    _, memory = decide(settings, memory, service.view(), service.now_s)
    assert memory.of("prefill").cold_start_s((), settings.cold_start_s) == 8.0


def test_the_same_view_gives_the_same_decision(service, settings):
    service.prompts(3.0)
    view, memory = service.view(), Memory()
    assert decide(settings, memory, view, 1.0) == decide(settings, memory, view, 1.0)
