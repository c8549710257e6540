"""The settings of an evaluation."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from rayapp.evaluation.bootstrap import NUM_RESAMPLES
from rayapp.settings import Strict, Threads


class EvaluationSettings(Strict):
    """All settings that decide what an evaluation measures, beside model, plan and data.

    The examples of a text are its windows (:mod:`rayapp.evaluation.measures.perplexity`).
    """

    model_config = ConfigDict(title="How it is measured")

    split: str = Field(
        default="", description="Which split the data were drawn from, for the record."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Examples of every task at most; windows, of texts."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of resampling and of timed prompts."
    )
    num_resamples: int = Field(
        default=NUM_RESAMPLES,
        ge=100,
        description="Resamples of every bootstrap interval.",
        json_schema_extra={"option": "resamples"},
    )
    num_window_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of a window of text; without, 2,048 or the model's context if shorter.",
        json_schema_extra={"option": "window"},
    )
    window_prompt_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of a window of text that prefill runs; decode is scored on the rest.",
    )
    max_num_seqs: int = Field(default=32, ge=1, description="Sequences that are decoded together.")
    num_threads: Threads = Field(default=1, json_schema_extra={"option": "threads"})
    num_runs: int = Field(
        default=30,
        ge=0,
        description="Interleaved timed runs of every batch size; 0 skips the timings.",
        json_schema_extra={"option": "runs"},
    )
    batch_sizes: tuple[int, ...] = Field(
        default=(1, 8),
        description="Batch size that is timed; may be given several times.",
        json_schema_extra={"option": "batch_size"},
    )
    num_prompt_tokens: int = Field(
        default=128,
        ge=1,
        description="Tokens of a timed prompt.",
        json_schema_extra={"option": "timed_prompt_tokens"},
    )
    num_answer_tokens: int = Field(
        default=64,
        ge=2,
        description="Tokens of a timed answer.",
        json_schema_extra={"option": "timed_answer_tokens"},
    )
