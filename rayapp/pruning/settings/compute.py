"""Where scores are computed: in this process, or on evaluators of a Ray cluster."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rayapp.pruning.settings.checked import Settings

CACHE_BYTES = 1 << 30
"""Bound of an evaluator's cache (project default)."""


class ComputeSettings(Settings):
    """Where scores are computed: nothing here changes a score by more than rounding."""

    workers: int = Field(
        default=0,
        ge=0,
        description="Number of Ray evaluators that share the work; 0 works in this process, "
        "without Ray.",
    )
    address: str | None = Field(
        default=None,
        description="Address of the Ray cluster; without it, the running one is used, or a local "
        "one is started.",
    )
    device: str = Field(
        default="cpu", description="Device that each evaluator computes on: cpu or cuda."
    )
    threads: int = Field(default=1, ge=1, description="Number of torch threads of each evaluator.")
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
        """What is recorded, but may differ between a search and its resumption."""
        return self.model_dump(mode="json", include={"device", "threads"})
