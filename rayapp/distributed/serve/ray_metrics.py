"""The service's numbers where operators of a Ray cluster look: its metrics, and Serve's logs.

Ray exports what a replica counts on its node's own port, with Serve's labels (deployment, replica,
application) beside ours; the names are those of ``/metrics``, after Ray's own prefix ``ray_``.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.serve import metrics

from rayapp.api.metrics import COUNTERS, HISTOGRAMS, SAVINGS, SECONDS
from rayapp.api.service import ReplicaHealth
from rayapp.kv.ledger import Ledger

FLUSH_S = 1.0
"""Seconds between two times that numbers are handed to Ray (project default)."""
_LEDGER = {
    "kv_transfer_bytes": ("KV bytes sent, overhead included", ()),
    "kv_transfer_saved_bytes": ("KV bytes that the plan kept from travelling", ("by",)),
    "kv_transfer_seconds": ("Seconds to publish and fetch KV", ()),
}
_GAUGES = {
    "num_requests_running": "Requests being computed",
    "num_requests_waiting": "Requests that wait",
    "kv_cache_usage_perc": "Share of KV entries in use, 0 to 1",
}
Labels = tuple[str, ...]


class RayMirror:
    """Hands the numbers of an ingress on to Ray, many at a time: each costs a call into Ray.

    Args:
        ledger: The ledger of this ingress replica.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._sent: dict[tuple[str, Labels], float] = {}
        self._amounts: dict[tuple[str, Labels], float] = {}
        self._seconds: dict[str, list[float]] = {}
        self._labels = {name: labels for name, (_, labels) in {**COUNTERS, **_LEDGER}.items()}
        self._flushing: asyncio.TimerHandle | None = None
        self._counters = {
            name: metrics.Counter(f"rayapp_{name}", description=text, tag_keys=labels)
            for name, (text, labels) in {**COUNTERS, **_LEDGER}.items()
        }
        self._histograms = {
            key: metrics.Histogram(f"rayapp_{name}", description=text, boundaries=list(SECONDS))
            for key, (name, text) in HISTOGRAMS.items()
        }

    def observe(self, key: str, seconds: float, times: int) -> None:
        """Take equal observations of a histogram."""
        self._seconds.setdefault(key, []).extend([seconds] * times)
        self._flush_soon()

    def count(self, name: str, amount: float, labels: tuple[str, ...]) -> None:
        """Take what a counter has grown by, with the values of its labels."""
        key = (name, labels)
        self._amounts[key] = self._amounts.get(key, 0.0) + amount
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Hand over everything now."""
        self._flushing = None
        self._count_transfers()
        amounts, self._amounts = self._amounts, {}
        for (name, labels), amount in amounts.items():
            if amount > 0:
                tags = dict(zip(self._labels[name], labels, strict=True))
                self._counters[name].inc(amount, tags=tags)
        seconds, self._seconds = self._seconds, {}
        for key, observed in seconds.items():
            for value in observed:
                self._histograms[key].observe(value)

    def _count_transfers(self) -> None:
        """Add what the ledger has grown by since the last time."""
        totals = self._ledger.totals.as_json()
        now: dict[tuple[str, Labels], float] = {
            ("kv_transfer_bytes", ()): totals["bytes_sent"],
            ("kv_transfer_seconds", ()): totals["put_s"] + totals["fetch_s"],
        }
        for cause in SAVINGS:
            now["kv_transfer_saved_bytes", (cause,)] = totals[f"saved_by_{cause}_bytes"]
        for key, total in now.items():
            self._amounts[key] = total - self._sent.get(key, 0.0)
        self._sent = now


class StageGauges:
    """The state of one replica, in Ray's metrics, with its pool as the label ``stage``."""

    def __init__(self) -> None:
        self._gauges = {
            name: metrics.Gauge(f"rayapp_{name}", description=text, tag_keys=("stage",))
            for name, text in _GAUGES.items()
        }

    def show(self, health: ReplicaHealth) -> None:
        """Show what a replica says of itself."""
        tags = {"stage": health.pool}
        values: dict[str, Any] = {
            "num_requests_running": health.num_running,
            "num_requests_waiting": health.num_waiting,
            "kv_cache_usage_perc": health.kv_usage,
        }
        for name, value in values.items():
            self._gauges[name].set(value, tags=tags)


def log_as_serve() -> None:
    """Write this package's log lines where Serve writes those of a replica."""
    ours, serves = logging.getLogger("rayapp"), logging.getLogger("ray.serve")
    ours.setLevel(logging.INFO)
    for handler in serves.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
