"""Everything that a reproduction is told, checked."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.dtype import DType
from rayapp.pruning.settings.checked import Settings
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import Heal, Method, SearchSettings

SHARE = 0.125
"""Of all blocks, what every plan removes by default: the lightest compression of the peers'
tables."""
LINK_GBPS = 10.0
"""Gigabits per second of the link that transfers are reckoned with (project default)."""

_NOT_IDENTITY = {
    "model", "calibration", "heal_data", "data", "out", "rows", "workers", "address", "resume",
    "allow_overlap", "link_gbps", "threads", "device", "num_runs",
}  # fmt: skip


class ReproduceSettings(Settings):
    """The settings of ``jobs/reproduce.py``.

    Attributes:
        model: Model directory; every evaluator reads it from this path.
        calibration: JSON lines that the searches score on.
        data: Evaluation files by name, each of lines of one kind.
        out: Local directory for plans, outcomes and tables.
        heal_data: JSON lines to train survivors on; without, healed rows are left out.
        heal: How healed rows are healed.
        prefill_remove: Blocks that prefill removes; with ``decode_remove``, in place of ``share``.
        decode_remove: Blocks that decode removes.
        share: Of all blocks, what each stage removes; rounded, at least one.
        rows: Names of the rows wanted; None is all. The dense row is always there.
        method: Search method of our rows.
        evaluations: Candidates scored at most by every search that has a budget.
        target_reduction: Times fewer bytes of the row with KV selection; without, it is left out.
        limit: Examples of every task at most.
        split: Which split the data are, for the record.
        num_window_tokens: Of texts; None: 2,048 or the model's context.
        num_runs: Timed runs per batch size; 0 skips the timings.
        link_gbps: Link that transfers are reckoned with, in gigabits per second.
        allow_overlap: Whether prompts may stand in both calibration and evaluation data.
        workers: Ray evaluators of the searches; 0 searches in this process, without Ray.
        address: Ray cluster to use.
        resume: Go on with what is in ``out``.
        seed: Of searches, timings and resampling.
        threads: Torch threads of every process.
        dtype: Element type.
        device: Of evaluators, and of the evaluation in this process.
    """

    model: str
    calibration: str
    data: dict[str, str] = Field(min_length=1)
    out: str
    heal_data: str | None = None
    heal: Heal = "pair"
    prefill_remove: int | None = Field(default=None, ge=1)
    decode_remove: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, lt=1)
    rows: tuple[str, ...] | None = None
    method: Method = SearchSettings.model_fields["method"].default
    evaluations: int | None = Field(default=None, ge=1)
    target_reduction: float | None = Field(default=None, gt=1)
    limit: int | None = Field(default=None, ge=1)
    split: str = ""
    num_window_tokens: int | None = Field(default=None, ge=2)
    num_runs: int = Field(default=30, ge=0)
    link_gbps: float = Field(default=LINK_GBPS, gt=0)
    allow_overlap: bool = False
    workers: int = Field(default=0, ge=0)
    address: str | None = None
    resume: bool = False
    seed: int = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)
    dtype: DType = "auto"
    device: str = "cpu"

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
        """Blocks that prefill and decode remove."""
        if self.prefill_remove is not None and self.decode_remove is not None:
            return self.prefill_remove, self.decode_remove
        count = max(1, round((SHARE if self.share is None else self.share) * num_blocks))
        return count, count

    @property
    def identity(self) -> dict[str, Any]:
        """What rows of one directory must agree on, but for files, which are hashed."""
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY)

    def score(self) -> ScoreSettings:
        """What all searches score."""
        return ScoreSettings(model=self.model, calibration=self.calibration, dtype=self.dtype)

    def compute(self) -> ComputeSettings:
        """Where all searches compute."""
        return ComputeSettings(
            workers=self.workers, address=self.address, device=self.device, threads=self.threads
        )

    def evaluation(self) -> EvaluationSettings:
        """How rows are measured."""
        return EvaluationSettings(
            split=self.split,
            limit=self.limit,
            seed=self.seed,
            num_window_tokens=self.num_window_tokens,
            num_threads=self.threads,
            num_runs=self.num_runs,
        )
