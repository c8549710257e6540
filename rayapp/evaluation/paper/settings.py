"""The settings of a reproduction, checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from rayapp.evaluation.settings import LINK_GBPS, Clock, EvaluationSettings, Spread
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import OptionalCalibrationFile, ScoreSettings
from rayapp.pruning.settings.search import Heal, Method, SearchSettings
from rayapp.settings import (
    Address,
    Device,
    DTypeName,
    ModelName,
    ModelSettings,
    Revision,
    Settings,
    Threads,
    Workers,
)

SHARE = 0.125
"""Share of all blocks that every plan removes by default: the lightest compression of the peers'
tables."""
Preset = Literal["tables", "paper"]
TIMED: dict[Preset, tuple[int, int]] = {"tables": (128, 64), "paper": (1020, 129)}
"""Tokens of timed prompts and answers; those of a paper are the medians of a public trace of
conversations (Azure, 2023)."""
PUBLISHED = "published sets"
"""The name of a directory of published sets among the data, until its sets take its place."""

_NOT_IDENTITY = {
    "model", "calibration", "heal_data", "data", "out", "rows", "workers", "address", "resume",
    "allow_overlap", "link_gbps", "threads", "device", "num_runs", "num_prompt_tokens",
    "num_answer_tokens", "batch_sizes", "preset", "plans", "calibration_per_task", "text_tokens",
    "maps", "count", "clock",
}  # fmt: skip


class ReproduceSettings(Settings):
    """The settings of ``rayapp reproduce``."""

    model_config = ConfigDict(title="What the tables are of")

    model: ModelName
    revision: Revision = None
    preset: Preset = Field(
        default="tables",
        description="Rows to make: the tables at one size (tables), or the map of blocks and every "
        "method over many sizes (paper).",
    )
    calibration: OptionalCalibrationFile = None
    data: dict[str, str] = Field(
        min_length=1,
        description="Evaluation file, of lines of one kind, as NAME=FILE; may be given several "
        "times. A directory of published sets stands for all of them, and calibrates and heals; "
        "NAME=DIR takes one of its sets.",
        json_schema_extra={"as_texts": True},
    )
    plans: dict[str, str] = Field(
        default_factory=dict,
        description="Plan that exists already, as NAME=PATH, for a row of its own; may be given "
        "several times.",
        json_schema_extra={"as_texts": True, "option": "plan"},
    )
    calibration_per_task: int = Field(
        default=32,
        ge=1,
        description="Calibration lines of every task that are drawn from published sets.",
    )
    text_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of each text of published sets that perplexity is measured on; all "
        "without.",
    )
    maps: int = Field(
        default=3,
        ge=0,
        description="Calibration sets that the map of blocks is measured on, from published sets.",
    )
    count: bool = Field(
        default=False,
        description="Only count: print what is done, and the tokens and hours of the rest.",
    )
    out: str = Field(description="Local directory for plans, outcomes and tables.")
    heal_data: str | None = Field(
        default=None,
        description="File of JSON lines that survivors are trained on; without it, healed rows are "
        "left out.",
    )
    heal: Heal = Field(
        default="pair",
        description="Healing of the healed rows: of blocks outside the pruning set (pair), of all, "
        "or in closed form (linear).",
    )
    prefill_remove: int | None = Field(
        default=None,
        ge=1,
        description="Number of blocks that prefill does without; given with --decode-remove, in "
        "place of --share.",
    )
    decode_remove: int | None = Field(
        default=None,
        ge=1,
        description="Number of blocks that decode does without; given with --prefill-remove, in "
        "place of --share.",
    )
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=f"Share of all blocks that each stage does without; {SHARE} without any size.",
    )
    rows: tuple[str, ...] | None = Field(
        default=None,
        description="Names of the rows that are wanted, such as greedy,kv_modes; all without it.",
        json_schema_extra={"as_text": True, "option": "methods"},
    )
    method: Method = Field(
        default=SearchSettings.model_fields["method"].default,
        description="Search method of our own rows.",
    )
    evaluations: int | None = Field(
        default=None,
        ge=1,
        description="Number of candidates that each search scores at most, where it has a budget.",
    )
    target_reduction: float | None = Field(
        default=None,
        gt=1,
        description="Goal of the row with KV selection: so many times fewer bytes; without it, the "
        "row is left out.",
    )
    limit: int | None = Field(
        default=None, ge=1, description=EvaluationSettings.model_fields["limit"].description
    )
    split: str = Field(default="", description=EvaluationSettings.model_fields["split"].description)
    num_window_tokens: int | None = Field(
        default=None,
        ge=2,
        description=EvaluationSettings.model_fields["num_window_tokens"].description,
        json_schema_extra={"option": "window"},
    )
    num_runs: int = Field(
        default=30,
        ge=0,
        description=EvaluationSettings.model_fields["num_runs"].description,
        json_schema_extra={"option": "runs"},
    )
    num_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of a timed prompt; without, 128, or 1,020 of a paper.",
        json_schema_extra={"option": "timed_prompt_tokens"},
    )
    num_answer_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of a timed answer; without, 64, or 129 of a paper.",
        json_schema_extra={"option": "timed_answer_tokens"},
    )
    batch_sizes: tuple[int, ...] = Field(
        default=EvaluationSettings.model_fields["batch_sizes"].default,
        description=EvaluationSettings.model_fields["batch_sizes"].description,
        json_schema_extra={"option": "batch_size"},
    )
    clock: Clock = Field(
        default="wall", description=EvaluationSettings.model_fields["clock"].description
    )
    link_gbps: float = Field(
        default=LINK_GBPS,
        gt=0,
        description="Gigabits per second of the link that transfers are reckoned with.",
    )
    allow_overlap: bool = Field(
        default=False,
        description="Let prompts stand in both calibration and evaluation data; tables say so.",
    )
    workers: Workers = 0
    address: Address = None
    resume: bool = Field(
        default=False, description="Resumption: go on with what is in the output directory."
    )
    seed: int = Field(default=0, ge=0, description="Seed of searches, timings and resampling.")
    threads: Threads = 1
    dtype: DTypeName = "auto"
    device: Device = "cpu"

    @field_validator("data", mode="before")
    @classmethod
    def _named_files(cls, value: object) -> object:
        """``NAME=FILE`` texts as a mapping from names to files; a directory has no name."""
        if not isinstance(value, list):
            return value
        pairs = [f"{PUBLISHED}={v}" if Path(str(v)).is_dir() else str(v) for v in value]
        return _named(pairs, "NAME=FILE, such as PIQA=piqa.jsonl, nor a directory that exists")

    @field_validator("plans", mode="before")
    @classmethod
    def _named_plans(cls, value: object) -> object:
        """``NAME=PATH`` texts as a mapping from names to plans."""
        return _named([str(v) for v in value], "NAME=PATH") if isinstance(value, list) else value

    @field_validator("rows", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_size(self) -> ReproduceSettings:
        sizes = (self.prefill_remove, self.decode_remove)
        if (None in sizes and sizes != (None, None)) or (
            self.share is not None and sizes != (None, None)
        ):
            raise ValueError(
                f"prefill_remove={sizes[0]}, decode_remove={sizes[1]} and share={self.share}: give "
                "both --prefill-remove and --decode-remove, or --share, or none of them"
            )
        return self

    def sizes(self, num_blocks: int) -> tuple[int, int]:
        """Numbers of blocks that prefill and decode remove."""
        if self.prefill_remove is not None and self.decode_remove is not None:
            return self.prefill_remove, self.decode_remove
        count = max(1, round((SHARE if self.share is None else self.share) * num_blocks))
        return count, count

    @model_validator(mode="after")
    def _calibrated(self) -> ReproduceSettings:
        directories = {path for path in self.data.values() if Path(path).is_dir()}
        if len(directories) > 1:
            raise ValueError(
                f"data={', '.join(sorted(directories))}: give one directory of published sets"
            )
        if self.calibration is None and not directories:
            raise ValueError(
                f"calibration=None with data={', '.join(self.data)}: give --calibration, or a "
                "directory of published sets as --data"
            )
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that rows of one directory must agree on; files are hashed instead."""
        unused = {"revision"} if self.revision is None else set()
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY | unused)

    def score(self) -> ScoreSettings:
        """The settings of the score of all searches, once it is known what calibrates."""
        assert self.calibration is not None, "published sets were written before"
        return ScoreSettings(
            model=self.model,
            revision=self.revision,
            calibration=self.calibration,
            dtype=self.dtype,
        )

    def compute(self) -> ComputeSettings:
        """The settings of the compute of all searches."""
        return ComputeSettings(
            workers=self.workers, address=self.address, device=self.device, threads=self.threads
        )

    def model_settings(self) -> ModelSettings:
        """The model as rows are measured."""
        return ModelSettings(
            model=self.model, revision=self.revision, dtype=self.dtype, device=self.device
        )

    def spread(self) -> Spread:
        """The place where rows are measured."""
        return Spread(workers=self.workers, address=self.address)

    def evaluation(self) -> EvaluationSettings:
        """The settings of the rows' evaluation."""
        timed = TIMED[self.preset]
        return EvaluationSettings(
            split=self.split,
            limit=self.limit,
            seed=self.seed,
            num_window_tokens=self.num_window_tokens,
            num_threads=self.threads,
            num_runs=self.num_runs,
            num_prompt_tokens=self.num_prompt_tokens or timed[0],
            num_answer_tokens=self.num_answer_tokens or timed[1],
            batch_sizes=self.batch_sizes,
            clock=self.clock,
            link_gbps=self.link_gbps,
        )


def _named(pairs: Sequence[str], form: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not (separator and name and path):
            raise ValueError(f"{pair} is not {form}")
        if name in named:
            raise ValueError(f"{name} is given twice; use another name for {path}")
        named[name] = path
    return named
