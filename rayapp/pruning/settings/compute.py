"""Settings of the compute: scores come from this process, or from evaluators of a Ray cluster."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from rayapp.settings import Address, Device, Settings, Threads, Workers

CACHE_BYTES = 1 << 30
"""Bound of an evaluator's cache (project default)."""


class ComputeSettings(Settings):
    """The place and resources of scoring; no setting changes a score by more than rounding."""

    model_config = ConfigDict(title="Where it is computed")

    workers: Workers = 0
    address: Address = None
    device: Device = "cpu"
    threads: Threads = 1
    cache_bytes: int = Field(
        default=CACHE_BYTES,
        ge=0,
        description="Bytes of computed states that each evaluator keeps for reuse at most.",
    )

    @property
    def in_process(self) -> bool:
        """Whether everything is computed in this process, without Ray."""
        return not self.workers and self.address is None

    @property
    def environment(self) -> dict[str, Any]:
        """The settings that are recorded, but may differ between a search and its resumption."""
        return self.model_dump(mode="json", include={"device", "threads"})
