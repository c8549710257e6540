"""Settings of pools that follow the load: the targets of answers, and how quickly pools change."""

from __future__ import annotations

from pydantic import ConfigDict, Field, model_validator

from rayapp.settings import Settings, Strict


class Targets(Settings):
    """Targets that answers are to meet, by which pools are sized."""

    model_config = ConfigDict(title="What answers are to meet")

    ttft_ms: float = Field(
        default=2000.0,
        gt=0.0,
        description="Longest time to the first token, milliseconds, that pools are sized for.",
    )
    tpot_ms: float = Field(
        default=100.0,
        gt=0.0,
        description="Longest time per further token, milliseconds, that pools are sized for.",
    )

    @property
    def ttft_s(self) -> float:
        """The longest time to the first token, seconds."""
        return self.ttft_ms / 1000.0

    @property
    def tpot_s(self) -> float:
        """The longest time per further token, seconds."""
        return self.tpot_ms / 1000.0


class ScalingSettings(Strict):
    """Settings of pools with MIN:MAX replicas: when they grow and when they shrink.

    Args:
        targets: The times to the first token and per further token.
        attainment: Share of requests that are to meet the targets.
        usage: Share of its time that a replica or its link may be busy at most.
        fast_s: Time over which the load is measured for growth.
        slow_s: Time over which it is measured as the state of rest.
        downscale_delay_s: Time for which a smaller pool must have been enough before it shrinks.
        largest_step: Most replicas that a pool gains or loses at once.
        cold_start_s: Time until a new replica works, before one has been measured.
        stale_s: Age after which a replica's report counts as missing.
        least_ratio: Fewest prefill replicas per decode replica; None for no bound.
        most_ratio: Most prefill replicas per decode replica; None for no bound.
        interval_s: Time between two reports of a replica.
    """

    targets: Targets = Targets()
    attainment: float = Field(default=0.99, gt=0.0, lt=1.0)
    usage: float = Field(default=0.9, gt=0.0, le=1.0)
    fast_s: float = Field(default=20.0, gt=0.0)
    slow_s: float = Field(default=120.0, gt=0.0)
    downscale_delay_s: float = Field(default=120.0, ge=0.0)
    largest_step: int = Field(default=4, ge=1)
    cold_start_s: float = Field(default=10.0, ge=0.0)
    stale_s: float = Field(default=15.0, gt=0.0)
    least_ratio: float | None = Field(default=None, gt=0.0)
    most_ratio: float | None = Field(default=None, gt=0.0)
    interval_s: float = Field(default=1.0, gt=0.0)

    @model_validator(mode="after")
    def _is_ordered(self) -> ScalingSettings:
        low, high = self.least_ratio, self.most_ratio
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"least_ratio {low:g} lies above most_ratio {high:g}; exchange the two"
            )
        if self.fast_s > self.slow_s:
            raise ValueError(
                f"fast_s {self.fast_s:g} is longer than slow_s {self.slow_s:g}; shorten it"
            )
        return self
