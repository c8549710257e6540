"""Where work is sent, from what is known of the replicas."""

from __future__ import annotations

from dataclasses import replace

from rayapp.scaling.routing import FORGIVEN_S, Errand, Known, Ways, first, ranked


def test_the_least_work_comes_first():
    replicas = {"a": Known(3.0, 0.0), "b": Known(1.0, 0.0), "c": Known(2.0, 0.0)}
    assert ranked(replicas, Errand(), 0.0) == [["b", "c", "a"]]
    assert first(ranked({}, Errand(), 0.0)) is None


def test_work_sent_since_a_report_counts_and_work_done_does_not():
    replicas = {"a": Known(2.0, 10.0), "b": Known(2.5, 10.0)}
    assert first(ranked(replicas, Errand(), 10.0)) == "a"
    replicas["a"] = replicas["a"].given(10.5, 1.0)
    assert first(ranked(replicas, Errand(), 11.0)) == "b"
    assert replicas["a"].left_s(11.0) == 2.0
    assert replicas["a"].left_s(13.5) == 0.0
    assert replicas["a"].reported(11.0, 0.4).left_s(11.0) == 0.4
    assert replicas["a"].reported(9.0, 9.0) == replicas["a"]


def test_a_silent_replica_does_not_look_ever_busier():
    silent = Known(1.0, 0.0)
    for second in range(100):
        silent = silent.given(float(second), 0.5)
    assert silent.left_s(100.0) == 0.0
    assert silent.left_s(99.0) == 0.5


def test_answers_side_by_side_end_with_their_length():
    decode = Known().reported(0.0, 4.0, lasts_s=20.0)
    assert decode.left_s(10.0) == 2.0
    assert decode.given(10.0, 1.0).left_s(15.0) == 1.0 + 0.75
    assert decode.left_s(30.0) == 0.0


def test_many_requests_at_once_spread_over_the_pool():
    replicas = {name: Known(0.0, 0.0) for name in "abcd"}
    chosen = []
    for _ in range(8):
        name = first(ranked(replicas, Errand(1.0), 1.0))
        chosen.append(name)
        replicas[name] = replicas[name].given(1.0, 1.0)
    assert sorted(chosen) == sorted("aabbccdd")


def test_a_replica_that_failed_is_avoided_for_a_while():
    broken = Known(0.0, 0.0).failed(100.0)
    replicas = {"broken": broken, "busy": Known(50.0, 100.0)}
    assert ranked(replicas, Errand(), 101.0) == [["busy"], ["broken"]]
    assert first(ranked(replicas, Errand(), 101.0 + FORGIVEN_S)) == "broken"
    twice = broken.failed(100.0)
    assert twice.is_avoided(101.0 + FORGIVEN_S)
    assert not twice.succeeded().is_avoided(101.0)
    assert ranked({"broken": broken}, Errand(), 101.0) == [["broken"]]


def test_replicas_to_avoid_come_last():
    replicas = {"a": Known(0.0, 0.0), "b": Known(9.0, 0.0)}
    assert ranked(replicas, Errand(avoid=frozenset("a")), 0.0) == [["b"], ["a"]]


def test_a_known_prefix_is_worth_what_it_saves():
    near, far = Known(1.0, 0.0, prefix_tokens=800), Known(0.5, 0.0)
    assert first(ranked({"near": near, "far": far}, Errand(1.0, 1e-3), 0.0)) == "near"
    assert first(ranked({"near": near, "far": far}, Errand(0.1, 1e-4), 0.0)) == "far"


def test_the_short_way_is_taken_when_it_is_sooner_and_delays_no_token_too_much():
    ways = Ways(
        queue_s=0.2, prefill_s=0.05, handoff_s=0.03, step_s=0.04, prompts_s=0.0, short_s=0.05
    )
    assert ways.is_short_sooner(tpot_s=0.1)
    assert not ways.is_short_sooner(tpot_s=0.08)  # a running answer would wait 90 ms
    assert not replace(ways, queue_s=0.0).is_short_sooner(tpot_s=0.1)  # 80 ms apart, 90 here
    assert not replace(ways, prompts_s=0.2).is_short_sooner(tpot_s=1.0)
    assert replace(ways, queue_s=1.0, prompts_s=0.2).is_short_sooner(tpot_s=1.0)
