"""Settings of a simulation: which load, how many replicas at most, and what one costs."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from rayapp.settings import (
    MODEL_HELP,
    DTypeName,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Settings,
    Threads,
)

Load = Literal["poisson", "burst", "ramp", "diurnal", "long-prompts", "long-answers"]


class LoadSettings(Settings):
    """The requests that come: those of a trace, or drawn ones."""

    model_config = ConfigDict(title="What comes")

    trace: str | None = Field(
        min_length=1,
        default=None,
        description="Trace of arrivals: Azure's CSV or Mooncake's JSON lines; drawn ones without.",
    )
    requests: int | None = Field(
        default=None, ge=1, description="Requests of the trace that are taken; all of it without."
    )
    divisor: float = Field(default=1.0, gt=0.0, description="Divisor of the trace's lengths.")
    load: Load = Field(default="poisson", description="Course of the load that is drawn.")
    rate: float = Field(
        default=1.0, gt=0.0, description="Requests per second, of a drawn load at its usual level."
    )
    span_s: float = Field(default=900.0, gt=0.0, description="Seconds that a drawn load lasts.")
    seed: int = Field(default=0, ge=0, description="Seed of a drawn load.")


class CapacitySettings(Settings):
    """Limits of a plan of capacity, and the share of requests that it has to satisfy."""

    model_config = ConfigDict(title="What may be used")

    attainment: float = Field(
        default=0.99, gt=0.0, lt=1.0, description="Share of requests that are to meet the targets."
    )
    most_replicas: int = Field(default=32, ge=1, le=512, description="Most replicas of each stage.")
    max_model_len: int = Field(
        default=1 << 17, ge=2, description="Most tokens of a prompt and its answer together."
    )
    short_prompt_tokens: int = Field(
        default=0,
        ge=0,
        description="Longest prompt that decode replicas may prefill themselves; 0 for none.",
    )
    price_per_hour: float = Field(
        default=1.0, gt=0.0, description="Price of one replica for an hour, in any currency."
    )


class MeasuringSettings(Settings):
    """How stage costs of a model are measured, and what is taken for granted."""

    model_config = ConfigDict(title="How a model is measured")

    model: str | None = Field(default=None, min_length=1, description=MODEL_HELP)
    dtype: DTypeName = "auto"
    threads: Threads = 1
    max_num_seqs: MaxNumSeqs = 16
    max_num_batched_tokens: MaxNumBatchedTokens = 512
    gbit_per_s: float = Field(
        default=10.0, gt=0.0, description="Rate of the link from every prefill replica, in Gbit/s."
    )
    cold_start_s: float = Field(
        default=10.0, ge=0.0, description="Seconds until a new replica works."
    )
