"""Numbers that Ray exports: those of the app, handed over many at a time."""

from __future__ import annotations

import asyncio

import pytest

from rayapp.api.metrics import ApiMetrics
from rayapp.api.service import ReplicaHealth
from rayapp.distributed.serve import ray_metrics
from rayapp.distributed.serve.ray_metrics import RayMirror, StageGauges
from rayapp.kv.ledger import Ledger


class Recorded:
    """A metric of Ray's that remembers its calls."""

    made: dict[str, Recorded] = {}

    def __init__(self, name, description, tag_keys=(), boundaries=None):
        assert description
        self.calls, self.tag_keys = [], tag_keys
        self.made[name] = self

    def inc(self, value, tags):
        assert value > 0
        assert set(tags) == set(self.tag_keys)
        self.calls.append((value, tags))

    def observe(self, value):
        self.calls.append(value)

    set = inc


@pytest.fixture
def recorded(monkeypatch):
    for kind in ("Counter", "Histogram", "Gauge"):
        monkeypatch.setattr(ray_metrics.metrics, kind, Recorded)
    monkeypatch.setattr(ray_metrics, "FLUSH_S", 0.01)
    Recorded.made = {}
    return Recorded.made


def test_what_the_app_counts_reaches_ray_in_one_go(recorded):
    async def scenario():
        app, ledger = ApiMetrics(), Ledger()
        app.mirror = RayMirror(ledger)
        for _ in range(3):
            app.count_prompt(5)
            app.count_response("/health", 200)
            app.observe_tokens(0.25, 2, first=False)
        ledger.totals.bytes_sent += 70
        await asyncio.sleep(0.05)
        app.count_prompt(1)
        await asyncio.sleep(0.05)

    asyncio.run(scenario())
    assert recorded["rayapp_prompt_tokens"].calls == [(15, {}), (1, {})]
    assert recorded["rayapp_http_responses"].calls == [(3, {"path": "/health", "status": "200"})]
    assert recorded["rayapp_inter_token_latency_seconds"].calls == [0.125] * 6
    assert recorded["rayapp_kv_transfer_bytes"].calls == [(70, {})]
    assert recorded["rayapp_kv_transfer_saved_bytes"].calls == []


def test_a_replica_shows_its_state_under_its_stage(recorded):
    health = ReplicaHealth(
        pool="decode", replica_id="r", node="n", parameter_bytes=1, plan_fingerprint="p",
        weights_fingerprint="w", dtype="float32", num_running=3, num_waiting=2, kv_usage=0.5,
    )  # fmt: skip
    StageGauges().show(health)
    tags = {"stage": "decode"}
    assert recorded["rayapp_num_requests_running"].calls == [(3, tags)]
    assert recorded["rayapp_num_requests_waiting"].calls == [(2, tags)]
    assert recorded["rayapp_kv_cache_usage_perc"].calls == [(0.5, tags)]
