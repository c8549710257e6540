"""Pools and reports as the service would show them to the policy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayapp.scaling.reports import DecodeReport, IngressReport, PrefillReport
from rayapp.scaling.settings import ScalingSettings, Targets
from rayapp.scaling.view import Heard, PoolView

PROMPT_S = 0.5
QUIET_PREFILL = PrefillReport(0.0, 0.0, 0.0, 0.0, 1e-3, 0.0)
QUIET_DECODE = DecodeReport(0, 0, 0, 32, 1e6, 0.02, 0.002, 1e-6, 100.0, 0, 0.0)


class Service:
    """A service whose replicas report what a test wants, second by second."""

    def __init__(self, **bounds: tuple[int, int]) -> None:
        self.bounds = {"prefill": (1, 8), "decode": (1, 8), "ingress": (1, 1), **bounds}
        self.now_s = 1000.0
        self.targets = {name: low for name, (low, _) in self.bounds.items()}
        self.silent: set[str] = set()
        self.prefill, self.decode = QUIET_PREFILL, QUIET_DECODE
        self.ingress = IngressReport(0.0, 0.0, 0.0)
        self._heard: dict[str, Heard] = {}

    def prompts(self, per_s: float, *, queued_s: float = 0.0) -> None:
        """A second passes in which prompts come to every prefill replica, equally many to each."""
        share = per_s / self.targets["prefill"]
        before = self.prefill
        self.prefill = replace(
            before,
            queued_s=queued_s,
            arrived=before.arrived + share,
            arrived_s=before.arrived_s + share * PROMPT_S,
            arrived_square_s=before.arrived_square_s + share * PROMPT_S**2,
        )

    def view(self) -> dict[str, PoolView]:
        """The pools after one more second."""
        self.now_s += 1.0
        pools = {}
        for name, bounds in self.bounds.items():
            running = tuple(f"{name}-{number}" for number in range(self.targets[name]))
            for replica in running:
                if replica not in self.silent:
                    report = {name: getattr(self, name)}
                    self._heard[replica] = Heard(self.now_s, **report)
            heard = {one: self._heard[one] for one in running if one in self._heard}
            pools[name] = PoolView(*bounds, self.targets[name], running, heard)
        return pools


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def settings() -> ScalingSettings:
    return ScalingSettings(
        targets=Targets(ttft_ms=2000, tpot_ms=50), fast_s=5, slow_s=20, downscale_delay_s=20
    )
