"""Autoscaling decisions from metrics; no cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rayapp.distributed.serve.autoscaling import DecodePolicy, PrefillPolicy, UnifiedPolicy

NAN = float("nan")


def context(metrics, replicas=("a", "b"), target=2):
    return SimpleNamespace(
        aggregated_metrics=metrics, running_replicas=list(replicas), target_num_replicas=target
    )


@pytest.mark.parametrize(
    ("queued", "wanted"), [((0, 0), 1), ((500, 500), 1), ((1500, 1), 2), ((2000, 2000), 4)]
)
def test_prefill_follows_the_tokens_in_its_queues(queued, wanted):
    metrics = {"queued_tokens": dict(zip("ab", queued, strict=True))}
    assert PrefillPolicy(tokens_per_replica=1000)(context(metrics))[0] == wanted


@pytest.mark.parametrize(
    ("usage", "waiting", "wanted"),
    [
        ((0, 0), (0, 0), 1),
        ((0.4, 0.4), (0, 0), 1),  # one replica would hold both at the target
        ((0.5, 0.4), (0, 0), 2),
        ((1, 1), (0, 0), 3),
        ((1, 1), (2, 0.4), 6),
    ],
)
def test_decode_follows_slots_in_use_and_wanted(usage, waiting, wanted):
    metrics = {
        "usage": dict(zip("ab", usage, strict=True)),
        "waiting": dict(zip("ab", waiting, strict=True)),
    }
    assert DecodePolicy(target_usage=0.8)(context(metrics))[0] == wanted


@pytest.mark.parametrize(
    "metrics",
    [None, {}, {"queued_tokens": {"a": 9000}}, {"queued_tokens": {"a": 1, "b": NAN}}, 3],
)
def test_a_pool_holds_where_numbers_are_missing(metrics):
    """A replica that has just started has reported nothing; Serve may report nothing at all."""
    for target in (1, 5):
        seen = context(metrics, target=target)
        assert PrefillPolicy(tokens_per_replica=1)(seen) == (target, {})
        assert DecodePolicy(target_usage=0.8)(seen) == (target, {})


def test_no_replica_is_no_information():
    assert PrefillPolicy(tokens_per_replica=1)(context({"queued_tokens": {}}, ())) == (2, {})


def test_unified_takes_the_larger():
    metrics = {"queued_tokens": {"a": 3000}, "usage": {"a": 0.1}, "waiting": {"a": 0.0}}
    seen = context(metrics, replicas="a")
    limits = {"tokens_per_replica": 1000, "target_usage": 0.8}
    assert UnifiedPolicy(**limits)(seen)[0] == 3
    assert UnifiedPolicy(**limits)(context({**metrics, "usage": {}}, "a"))[0] == 2
