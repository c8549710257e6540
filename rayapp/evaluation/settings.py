"""The settings of an evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from rayapp.evaluation.bootstrap import NUM_RESAMPLES
from rayapp.settings import Address, Settings, Strict, Threads, Workers

LINK_GBPS = 10.0
"""Gigabits per second of the link that transfers are computed with (project default)."""


Clock = Literal["wall", "cpu"]
"""The clock of timings: ``cpu`` counts the seconds that this process computes."""


class Spread(Settings):
    """The place where an evaluation computes; no number depends on it."""

    model_config = ConfigDict(title="Where it is computed")

    workers: Workers = 0
    address: Address = None

    @property
    def in_process(self) -> bool:
        """Whether everything is computed in this process, without Ray."""
        return not self.workers and self.address is None


class EvaluationSettings(Strict):
    """All settings that decide what an evaluation measures, beside model, plan and data.

    The examples of a text are its windows (:mod:`rayapp.evaluation.measures.perplexity`).
    ``lengths`` are tokens of timed prompts and answers.
    """

    model_config = ConfigDict(title="How it is measured")

    split: str = Field(
        default="", description="Which split the data were drawn from, for the record."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Examples of every task at most; windows, of texts."
    )
    spread: bool = Field(
        default=False,
        description="Take a limited task's examples evenly over its lines, not from its beginning.",
    )
    whole_answers: bool = Field(
        default=False,
        description="Score published questions about letters by their answers (cloze), so that "
        "both stages answer.",
    )
    choice_metric: Literal["acc", "acc_norm"] = Field(
        default="acc",
        description="Accuracy that the margin above chance is computed of; fix it beforehand.",
        json_schema_extra={"option": "metric"},
    )
    num_compared: int = Field(
        default=1,
        ge=1,
        description="Plans that this data set is to tell the best of; intervals of the margin and "
        "of perplexity are widened for so many.",
        json_schema_extra={"option": "compared"},
    )
    expected_flips: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Share of answers that only one side is expected to give right; --plan-only "
        "tells the interval that follows.",
    )
    num_rollouts: int = Field(
        default=0,
        ge=0,
        description="Prompts of every task along whose greedy dense answers the plan is compared; "
        "conversations always are.",
        json_schema_extra={"option": "rollouts"},
    )
    max_rollout_tokens: int = Field(
        default=256,
        ge=2,
        description="Tokens of such an answer at most.",
        json_schema_extra={"option": "rollout_tokens"},
    )
    chat: bool = Field(
        default=False,
        description="Begin rollouts under the model's chat template, too.",
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
    lengths: tuple[tuple[int, int], ...] = Field(
        default=(),
        description="Tokens of a timed prompt and answer as IN/OUT, such as 1020/129, in place of "
        "both options above; may be given several times.",
        json_schema_extra={"option": "length", "as_texts": True},
    )
    clock: Clock = Field(
        default="wall",
        description="Clock of timings: wall, or cpu for busy machines, which counts the seconds "
        "that one thread computes.",
    )
    link_gbps: float = Field(
        default=LINK_GBPS,
        gt=0,
        description="Gigabits per second of the link that the handoff is computed with.",
    )

    @field_validator("lengths", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """``IN/OUT`` texts as pairs of numbers."""
        if not isinstance(value, list | tuple):
            return value
        return [_length(pair) if isinstance(pair, str) else pair for pair in value]

    @model_validator(mode="after")
    def _one_thread(self) -> EvaluationSettings:
        if self.clock == "cpu" and self.num_threads > 1:
            raise ValueError(
                f"clock=cpu with num_threads={self.num_threads}: it adds up the seconds of all "
                "threads; give --threads 1, or --clock wall"
            )
        return self

    @property
    def timed_lengths(self) -> tuple[tuple[int, int], ...]:
        """Tokens of prompt and answer of every timing."""
        return self.lengths or ((self.num_prompt_tokens, self.num_answer_tokens),)


def _length(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{text} is not IN/OUT, such as 1020/129")
    prompt, answer = map(int, parts)
    if prompt < 1 or answer < 2:
        raise ValueError(f"{text}: a timed prompt has at least 1 token and an answer at least 2")
    return prompt, answer
