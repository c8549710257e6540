"""Everything that a selection of KV is told, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rayapp.errors import InputError
from rayapp.plan import CountOrShare, Encoding, PruningPlan
from rayapp.pruning.evaluator.calibration import CHUNK_TOKENS
from rayapp.pruning.evaluator.evaluator import CACHE_BYTES
from rayapp.pruning.evaluator.objective import ScoreBy
from rayapp.pruning.kv_choice.levels import FIRST, RECENT
from rayapp.pruning.settings import PruneSettings, checked

KVMethod = Literal["elimination", "mass"]

THRESHOLD = 0.9
"""Mass from which on a block is cut: SimLayerKV's value for Llama-3 (arXiv:2410.13846); PDTrim's is
not public."""

_NOT_IDENTITY = {"model", "plan", "calibration", "out", "workers", "address", "cache_bytes"}


class KVSelectSettings(BaseModel):
    """The settings of ``rayapp kv-select``.

    Attributes:
        model: Model directory; every evaluator reads it from this path.
        plan: Plan directory, or its ``plan.json``.
        calibration: File of JSON lines.
        out: Directory for plan and ``kv.json``; None: that of the plan, in place.
        target_reduction: Least ``bytes_full / bytes_sent`` on the calibration prompts.
        max_kl: Largest score on the calibration set.
        encoding: The smallest encoding allowed; ``model`` never quantises.
        method: ``elimination`` scores whole sets; ``mass`` is PDTrim's threshold rule.
        threshold: For ``mass``: cut blocks whose first and last entries hold this share of
            attention.
        first: Entries that a cut keeps at the start.
        recent: Lengths of the recent window that a cut may keep; ``mass`` uses the first one.
        score_by: Whether tasks or tokens weigh equally.
        generation_size: Sets asked at a time, whatever the number of workers (project default).
        seed: Of the sets that are drawn at random.
        workers: Ray evaluators; 0 scores in this process, without Ray.
        address: Ray cluster to use; None uses the running one, or starts one here.
        device: Device of each evaluator.
        threads: Torch threads of each evaluator.
        chunk_tokens: Tokens that an evaluator runs at a time, padding included.
        cache_bytes: Bound of each evaluator's cache.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    plan: str
    calibration: str
    out: str | None = None
    target_reduction: float | None = Field(default=None, gt=0)
    max_kl: float | None = Field(default=None, ge=0)
    encoding: Encoding = "model"
    method: KVMethod = "elimination"
    threshold: float | None = Field(default=None, ge=0, le=1)
    first: CountOrShare = FIRST
    recent: tuple[CountOrShare, ...] = Field(default=RECENT, min_length=1)
    score_by: ScoreBy = "task"
    generation_size: int = Field(default=8, ge=1)
    seed: int = 0
    workers: int = Field(default=0, ge=0)
    address: str | None = None
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    chunk_tokens: int = Field(default=CHUNK_TOKENS, ge=1)
    cache_bytes: int = Field(default=CACHE_BYTES, ge=0)

    @classmethod
    def checked(cls, **values: Any) -> KVSelectSettings:
        """Settings from a command line; raises :class:`InputError` naming every bad value."""
        return checked(cls, values)

    @model_validator(mode="after")
    def _one_goal(self) -> KVSelectSettings:
        goals = [self.target_reduction, self.max_kl, self.threshold]
        given = sum(goal is not None for goal in goals)
        if self.method == "elimination" and (given != 1 or self.threshold is not None):
            raise ValueError(
                "elimination needs one goal: give either --target-reduction or --max-kl (and "
                "--threshold only with --method mass)"
            )
        if self.method == "mass" and (given > 1 or self.max_kl is not None):
            raise ValueError("mass takes either --threshold or --target-reduction, not both")
        if not all(self.first or recent for recent in self.recent):
            raise ValueError("a cut keeps something: make first or every recent window at least 1")
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that changes the choice, but paths."""
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY | {"device", "threads"})

    def scoring(self, plan: PruningPlan) -> PruneSettings:
        """What evaluators are told: candidates bring their own transfer rules."""
        return PruneSettings(
            model=self.model,
            calibration=self.calibration,
            out=self.out or self.plan,
            score_by=self.score_by,
            first_token=plan.first_token,
            visual_tokens=plan.visual_tokens,
            workers=self.workers,
            address=self.address,
            device=self.device,
            threads=self.threads,
            chunk_tokens=self.chunk_tokens,
            cache_bytes=self.cache_bytes,
        )


def amounts(first: str | None, recent: Sequence[str] | None) -> dict[str, Any]:
    """``first`` and ``recent`` as a command line gives them, where it does: 4, or 0.25."""
    found: dict[str, Any] = {} if first is None else {"first": _amount("--first", first)}
    if recent:
        found["recent"] = tuple(_amount("--last", text) for text in recent)
    return found


def _amount(option: str, text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise InputError(
            f"{option} {text}: is neither a count (4) nor a share (0.25) of a prompt's entries"
        ) from None
