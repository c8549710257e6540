"""Numbers for Prometheus: counters of the processes that serve HTTP, and gauges from the service.

Metric names follow vLLM's. Every process that serves HTTP counts its own requests, and shows the
sums over all of them, so it does not matter which one is asked. The numbers of pools and ledger
cover the whole service. A request id is never a label.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from math import inf
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.utils import floatToGoString
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayapp.api.service import Counts, HealthReport, ReplicaHealth
from rayapp.engine.request import Timeline, TokenBatch

logger = logging.getLogger(__name__)
SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
HISTOGRAMS = {
    "ttft_s": ("time_to_first_token_seconds", "Arrival to first token"),
    "queue_s": ("request_queue_time_seconds", "Arrival to begin of prefill"),
    "prefill_s": ("request_prefill_time_seconds", "Prefill of one request"),
    "handoff_s": ("request_handoff_time_seconds", "End of prefill to decode's slot"),
    "decode_s": ("request_decode_time_seconds", "Decode's slot to last token"),
    "e2e_s": ("e2e_request_latency_seconds", "Arrival to last token"),
    "tpot_s": ("request_time_per_output_token_seconds", "(latency - TTFT) / (tokens - 1)"),
    "itl_s": ("inter_token_latency_seconds", "Gap between tokens; a batch's gap is shared"),
}
SAVINGS = ("visual_tokens", "blocks", "tokens", "encoding")


COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prompt_tokens": ("Prompt tokens taken in", ()),
    "generation_tokens": ("Answer tokens sent out", ()),
    "request_success": ("Answers completed", ("finished_reason",)),
    "http_responses": ("HTTP responses", ("path", "status")),
}


class Mirror(Protocol):
    """Another place where the numbers of an app are to be seen."""

    def observe(self, key: str, seconds: float, times: int) -> None:
        """Take equal observations of a histogram, by its key in ``HISTOGRAMS``."""
        ...

    def count(self, name: str, amount: float, labels: tuple[str, ...]) -> None:
        """Take what a counter of ``COUNTERS`` has grown by, with the values of its labels."""
        ...


class ApiMetrics:
    """Counters and histograms of one app.

    They are plain numbers, because every token counts: the client library's own metrics take
    locks, and as long for a token as its text does. An app has one event loop, and so no race.

    Attributes:
        mirror: Another place that gets them as they grow, None if there is none.
    """

    mirror: Mirror | None = None

    def __init__(self) -> None:
        self._seconds = {key: _Seconds() for key in HISTOGRAMS}
        self._counters: dict[str, dict[tuple[str, ...], float]] = {
            name: {} if labels else {(): 0.0} for name, (_, labels) in COUNTERS.items()
        }

    def _count(self, name: str, amount: float = 1, labels: tuple[str, ...] = ()) -> None:
        counter = self._counters[name]
        counter[labels] = counter.get(labels, 0.0) + amount
        if self.mirror is not None:
            self.mirror.count(name, amount, labels)

    def _observe(self, key: str, seconds: float, times: int = 1) -> None:
        self._seconds[key].observe(seconds, times)
        if self.mirror is not None:
            self.mirror.observe(key, seconds, times)

    def count_response(self, path: str, status: int) -> None:
        """Count a response; ``path`` is a route's pattern, so there are few of them."""
        self._count("http_responses", labels=(path, str(status)))

    def count_prompt(self, num_tokens: int) -> None:
        """Count the tokens of an accepted prompt."""
        self._count("prompt_tokens", num_tokens)

    def answer_observer(self) -> AnswerObserver:
        """Return an observer for one answer."""
        return AnswerObserver(self)

    def observe_finished(self, timeline: Timeline, num_tokens: int, reason: str) -> None:
        """Record how long every phase of a finished answer took."""
        spans = timeline.intervals()
        for key in spans.keys() & self._seconds.keys() - {"ttft_s"}:
            self._observe(key, max(spans[key], 0.0))
        if num_tokens > 1 and {"e2e_s", "ttft_s"} <= spans.keys():
            self._observe("tpot_s", (spans["e2e_s"] - spans["ttft_s"]) / (num_tokens - 1))
        self._count("request_success", labels=(reason,))

    def observe_tokens(self, gap_s: float, num_tokens: int, *, first: bool) -> None:
        """Record a batch of tokens and the time since the batch before it."""
        self._count("generation_tokens", num_tokens)
        if first:
            self._observe("ttft_s", gap_s)
            return
        self._observe("itl_s", gap_s / num_tokens, num_tokens)

    def counts(self) -> Counts:
        """Return all counters and histograms of this process as plain numbers."""
        counts: Counts = {}
        for key, (name, _) in HISTOGRAMS.items():
            for sample, labels, value in self._seconds[key].samples():
                counts[f"rayapp_{name}", f"rayapp_{name}{sample}", labels] = value
        for name, (_, names) in COUNTERS.items():
            for values, value in self._counters[name].items():
                labels = tuple(zip(names, values, strict=True))
                counts[f"rayapp_{name}", f"rayapp_{name}_total", labels] = value
        return counts

    def render(
        self,
        health: HealthReport,
        transfers: dict[str, Any] | None,
        elsewhere: Sequence[Counts] = (),
    ) -> bytes:
        """Return all metrics as Prometheus text.

        Args:
            health: The replicas that answer.
            transfers: The ledger; None leaves its families out.
            elsewhere: What other processes of the service have counted.
        """
        snapshot = CollectorRegistry()
        own = _summed([self.counts(), *elsewhere])
        families = [*own, *_pool_gauges(health), *_ledger_counters(transfers)]
        snapshot.register(_Snapshot(families))  # type: ignore[arg-type]
        return generate_latest(snapshot)


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
            spans = " ".join(f"{name}={s:.4f}" for name, s in timeline.intervals().items())
            logger.info(
                "request %s: %s after %d tokens; %s",
                *(batch.request_id, batch.finish_reason, self._num_tokens, spans),
            )


class _Seconds:
    """A histogram of seconds with the buckets ``SECONDS``."""

    def __init__(self) -> None:
        self._in_bucket = [0] * (len(SECONDS) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float, times: int) -> None:
        self._in_bucket[bisect_left(SECONDS, seconds)] += times
        self._sum_s += seconds * times

    def samples(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        """Ending of the sample's name, labels and value; every bucket counts those below it."""
        up_to = list(accumulate(self._in_bucket))
        for bound, count in zip((*SECONDS, inf), up_to, strict=True):
            yield "_bucket", (("le", floatToGoString(bound)),), count
        yield "_count", (), up_to[-1]
        yield "_sum", (), self._sum_s


def _summed(counted: Sequence[Counts]) -> list[Metric]:
    """All families with the sums over all processes."""
    sums: Counts = {}
    for counts in counted:
        for key, value in counts.items():
            sums[key] = sums.get(key, 0.0) + value
    families = {
        **{f"rayapp_{name}": (text, "histogram") for name, text in HISTOGRAMS.values()},
        **{f"rayapp_{name}": (text, "counter") for name, (text, _) in COUNTERS.items()},
    }
    summed = {name: Metric(name, *about) for name, about in families.items()}
    for (name, sample, labels), value in sums.items():
        summed[name].add_sample(sample, dict(labels), value)
    return list(summed.values())


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
    for cause in SAVINGS:
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
