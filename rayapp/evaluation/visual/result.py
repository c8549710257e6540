"""The result of a comparison of ways to prune visual tokens, stored as ``visual_quality.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Base64Bytes, Field, ValidationError, model_validator

from rayapp.errors import DataError
from rayapp.evaluation.bootstrap import Bound, upper_bound
from rayapp.evaluation.machine import Machine
from rayapp.evaluation.result import CLAIM_EXAMPLES, DataFile
from rayapp.evaluation.visual.matches import Matches
from rayapp.plan import ModelSignature, PruningPlan, VisualTokens
from rayapp.settings import Strict

VISUAL_FILE = "visual_quality.json"
"""Name of the result's file beside a plan, where ``rayapp report`` looks for it."""
RESAMPLES = 2_000
Groups = Mapping[str, Sequence[int]]
"""Line numbers by task."""


class VisualRow(Strict):
    """One rule beside the dense model: exact match by task, shares.

    ``lost`` is in percentage points, dense minus rule; ``mean_lost`` is the loss of the mean over
    tasks, which count alike. ``num_aligned`` is the setting of a plan's rule.
    """

    method: str
    num_keep: int = Field(ge=1)
    num_aligned: int | float | None = None
    exact_match: dict[str, float]
    lost: dict[str, Bound]
    mean_lost: Bound

    @property
    def mean(self) -> float:
        """Mean exact match over tasks."""
        return mean_over_tasks(self.exact_match)

    @classmethod
    def of(cls, rule: VisualTokens, matches: Matches, dense: Matches, groups: Groups) -> VisualRow:
        """A row from matches ``(L,)`` of a rule that keeps a count, and of the dense model."""
        worse = points_lost(dense, matches, groups)
        return cls(
            method=rule.method,
            num_keep=int(rule.num_keep),
            num_aligned=rule.num_aligned,
            exact_match=exact_match(matches, groups),
            lost={
                task: upper_bound([each], num_resamples=RESAMPLES)
                for task, each in zip(groups, worse, strict=True)
            },
            mean_lost=upper_bound(worse, num_resamples=RESAMPLES),
        )


def exact_match(matches: Matches, groups: Groups) -> dict[str, float]:
    """Share of matches ``(L,)`` by task."""
    return {task: float(matches[list(group)].mean()) for task, group in groups.items()}


def mean_over_tasks(shares: Mapping[str, float]) -> float:
    """The mean over tasks, which count alike."""
    return sum(shares.values()) / len(shares)


def points_lost(better: Matches, worse: Matches, groups: Groups) -> list[list[float]]:
    """Percentage points lost by task and example: 100, 0 or -100."""
    points_L = 100.0 * (better.astype(np.float64) - worse.astype(np.float64))
    return [points_L[list(group)].tolist() for group in groups.values()]


class StageGain(Strict):
    """The gain of TrimTokenator's two stages over one of them alone, mean over tasks, in points.

    ``at_least`` is the one-sided 95 % lower bound of a paired bootstrap.
    """

    num_keep: int
    alone: str
    gain: float
    at_least: float

    @classmethod
    def of(
        cls, num_keep: int, alone: str, both: Matches, one: Matches, groups: Groups
    ) -> StageGain:
        """The gain from matches ``(L,)`` of both stages, and of the one called ``alone``."""
        lost = upper_bound(points_lost(one, both, groups), num_resamples=RESAMPLES)
        return cls(num_keep=num_keep, alone=alone, gain=0.0 - lost.mean, at_least=0.0 - lost.upper)


class View(Strict):
    """One grid of tokens over its picture, with the tokens that methods keep.

    ``photo`` is a PNG. ``kept`` holds indices in reading order, by method.
    """

    photo: Base64Bytes = Field(max_length=4 * 2**20)
    rows: int = Field(ge=1, le=512)
    columns: int = Field(ge=1, le=512)
    kept: dict[str, tuple[int, ...]]

    @model_validator(mode="after")
    def _check(self) -> View:
        count = self.rows * self.columns
        outside = [index for kept in self.kept.values() for index in kept if not 0 <= index < count]
        if outside:
            raise ValueError(f"token {outside[0]} does not lie in {self.rows} x {self.columns}")
        if not self.photo.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError("a photo is no PNG")
        return self


class VisualSample(Strict):
    """A question, its right answer, whether each method gave it, and views of its images."""

    task: str
    question: str
    answer: str
    num_keep: int
    is_match: dict[str, bool]
    views: tuple[View, ...]


class VisualQuality(Strict):
    """Every rule on the same questions; ``dense`` is the dense model's exact match by task.

    ``num_visual_tokens`` has the fewest and the most tokens of a question's images before pruning.
    ``sweep`` has TrimTokenator rows with other shares that survive its first stage. Samples are
    questions from the beginning of the data; none was picked.
    """

    version: Literal[1] = 1
    model: ModelSignature
    dtype: str
    data: tuple[DataFile, ...]
    split: str
    num_examples: dict[str, int]
    num_visual_tokens: tuple[int, int]
    dense: dict[str, float]
    rows: tuple[VisualRow, ...]
    stages: tuple[StageGain, ...] = ()
    sweep: tuple[VisualRow, ...] = ()
    samples: tuple[VisualSample, ...] = ()
    machine: Machine
    wall_s: float
    cpu_s: float

    def is_of(self, plan: PruningPlan) -> bool:
        """Whether the result was measured on the model that a plan is for."""
        return plan.model == self.model

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order of the rows."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def budgets(self) -> tuple[int, ...]:
        """Numbers of tokens kept, ascending."""
        return tuple(sorted({row.num_keep for row in self.rows}))

    @property
    def caveats(self) -> tuple[str, ...]:
        """Reasons why these numbers must not be quoted as claims; empty if they may."""
        reasons = []
        fewest = min(self.num_examples.values())
        if fewest < CLAIM_EXAMPLES:
            reasons.append(
                f"{fewest} questions in the smallest task; points lost need {CLAIM_EXAMPLES:,} each"
            )
        if not self.split:
            reasons.append("the split of the data is not stated")
        return tuple(reasons)

    def save(self, path: str | Path) -> Path:
        """Write JSON to ``path``, creating its directory; returns the file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return target

    def save_beside(self, path: str | Path) -> Path:
        """Call :meth:`save` in the directory ``path``, or in that of the file, for its report."""
        home = Path(path) if Path(path).is_dir() else Path(path).parent
        return self.save(home / VISUAL_FILE)

    @classmethod
    def parse(cls, content: bytes, where: str) -> VisualQuality:
        """Parse the content that :meth:`save` wrote; raises :class:`DataError` if it is none."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first: Any = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "file"
            raise DataError(
                f"{where}: is no comparison of visual pruning ({name}: {first['msg']}); "
                "write one with `rayapp evaluate --compare-visual-tokens`"
            ) from None
