"""Numbers for Prometheus: this process's own counters, and gauges from the service and its ledger.

Metric names follow vLLM's. Every process that serves HTTP counts its own requests; the numbers of
pools and ledger cover the whole service. A request id is never a label.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayapp.api.service import HealthReport, ReplicaHealth
from rayapp.engine.request import Timeline, TokenBatch

_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_HISTOGRAMS = {
    "ttft_s": ("time_to_first_token_seconds", "Arrival to first token"),
    "queue_s": ("request_queue_time_seconds", "Arrival to begin of prefill"),
    "prefill_s": ("request_prefill_time_seconds", "Prefill of one request"),
    "handoff_s": ("request_handoff_time_seconds", "End of prefill to decode's slot"),
    "decode_s": ("request_decode_time_seconds", "Decode's slot to last token"),
    "e2e_s": ("e2e_request_latency_seconds", "Arrival to last token"),
    "tpot_s": ("request_time_per_output_token_seconds", "(latency - TTFT) / (tokens - 1)"),
    "itl_s": ("inter_token_latency_seconds", "Gap between tokens; a batch's gap is shared"),
}
_SAVINGS = ("visual_tokens", "blocks", "tokens", "encoding")


class ApiMetrics:
    """Counters and histograms of one app, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._seconds = {
            key: Histogram(f"rayapp_{name}", text, buckets=_SECONDS, registry=self._registry)
            for key, (name, text) in _HISTOGRAMS.items()
        }
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in")
        self._answer_tokens = self._counter("generation_tokens", "Answer tokens sent out")
        self._finished = self._counter("request_success", "Answers completed", "finished_reason")
        self._responses = self._counter("http_responses", "HTTP responses", "path", "status")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"rayapp_{name}", text, labels, registry=self._registry)

    def count_response(self, path: str, status: int) -> None:
        """Count a response; ``path`` is a route's pattern, so there are few of them."""
        self._responses.labels(path, str(status)).inc()

    def count_prompt(self, num_tokens: int) -> None:
        """Count the tokens of an accepted prompt."""
        self._prompt_tokens.inc(num_tokens)

    def answer_observer(self) -> AnswerObserver:
        """Return an observer for one answer."""
        return AnswerObserver(self)

    def observe_finished(self, timeline: Timeline, num_tokens: int, reason: str) -> None:
        """Record how long every phase of a finished answer took."""
        spans = timeline.intervals()
        for key in spans.keys() & self._seconds.keys() - {"ttft_s"}:
            self._seconds[key].observe(max(spans[key], 0.0))
        if num_tokens > 1 and {"e2e_s", "ttft_s"} <= spans.keys():
            self._seconds["tpot_s"].observe((spans["e2e_s"] - spans["ttft_s"]) / (num_tokens - 1))
        self._finished.labels(reason).inc()

    def observe_tokens(self, gap_s: float, num_tokens: int, *, first: bool) -> None:
        """Record a batch of tokens and the time since the batch before it."""
        self._answer_tokens.inc(num_tokens)
        if first:
            self._seconds["ttft_s"].observe(gap_s)
            return
        for _ in range(num_tokens):
            self._seconds["itl_s"].observe(gap_s / num_tokens)

    def render(self, health: HealthReport, transfers: dict[str, Any] | None) -> bytes:
        """Return all metrics as Prometheus text; without a ledger, its families are left out."""
        snapshot = CollectorRegistry()
        snapshot.register(_Snapshot([*_pool_gauges(health), *_ledger_counters(transfers)]))  # type: ignore[arg-type]
        return generate_latest(self._registry) + generate_latest(snapshot)


class AnswerObserver:
    """Feeds the metrics with the token batches of one answer."""

    def __init__(self, metrics: ApiMetrics) -> None:
        self._metrics = metrics
        self._num_tokens = 0
        self._previous_s: float | None = None

    def __call__(self, timeline: Timeline, batch: TokenBatch) -> None:
        """Take one batch, and mark the timeline's first and last token."""
        now_s = time.monotonic()
        first = self._previous_s is None
        since_s = timeline.arrived_s if self._previous_s is None else self._previous_s
        if first:
            timeline.first_token_s = now_s
        num_tokens = len(batch.token_ids)
        if num_tokens:
            self._metrics.observe_tokens(max(now_s - since_s, 0.0), num_tokens, first=first)
            self._num_tokens += num_tokens
            self._previous_s = now_s
        if batch.finish_reason:
            timeline.finished_s = now_s
            self._metrics.observe_finished(timeline, self._num_tokens, batch.finish_reason)


class _Snapshot:
    """A Prometheus collector over metric families that are complete already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


_GAUGES: dict[str, tuple[str, Callable[[Sequence[ReplicaHealth]], float]]] = {
    "num_replicas": ("Replicas that answer", len),
    "num_requests_running": (
        "Requests being computed",
        lambda replicas: sum(replica.num_running for replica in replicas),
    ),
    "num_requests_waiting": (
        "Requests that wait",
        lambda replicas: sum(replica.num_waiting for replica in replicas),
    ),
    "kv_cache_usage_perc": (
        "Share of KV entries in use, 0 to 1",
        lambda replicas: sum(replica.kv_usage for replica in replicas) / len(replicas),
    ),
}


def _pool_gauges(health: HealthReport) -> list[Metric]:
    pools = health.pools()
    gauges: list[Metric] = []
    for name, (text, value) in _GAUGES.items():
        family = GaugeMetricFamily(f"rayapp_{name}", text, labels=["stage"])
        for pool, replicas in pools.items():
            family.add_metric([pool], value(replicas))
        gauges.append(family)
    return gauges


def _ledger_counters(transfers: dict[str, Any] | None) -> list[Metric]:
    if transfers is None:
        return []
    totals = transfers.get("totals", {})
    saved = CounterMetricFamily(
        "rayapp_kv_transfer_saved_bytes",
        "KV bytes that the plan kept from travelling",
        labels=["by"],
    )
    for cause in _SAVINGS:
        saved.add_metric([cause], totals.get(f"saved_by_{cause}_bytes", 0))
    sent = CounterMetricFamily("rayapp_kv_transfer_bytes", "KV bytes sent, overhead included")
    sent.add_metric([], totals.get("bytes_sent", 0))
    spent = CounterMetricFamily("rayapp_kv_transfer_seconds", "Seconds to publish and fetch KV")
    spent.add_metric([], totals.get("put_s", 0.0) + totals.get("fetch_s", 0.0))
    return [sent, saved, spent]


class CountResponses:
    """ASGI layer that counts every response by its route's pattern and its status."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the app and count the response when it starts."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.count_response(path, message["status"])
            await send(message)

        await self._app(scope, receive, counted)
