"""Geometry of the report's plots, in a unit square: x to the right, y downwards (SVG)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rayapp.evaluation.report.axes import Scale, Tick
from rayapp.evaluation.report.kv_findings import KVStep
from rayapp.evaluation.report.search_record import FrontRow, TrialRow
from rayapp.evaluation.result import EvaluationResult
from rayapp.plan import STAGES, PruningPlan, Stage

MAX_DOTS = 1_000

Shape = Literal["circle", "square", "diamond", "triangle"]
SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Mark:
    """One point; ``title`` is its text, and ``is_special`` makes it stand out."""

    x: float
    y: float
    title: str
    is_special: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one kind, in one shape."""

    name: str
    shape: Shape
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Plot:
    """Series over one vertical axis, and lines across it as ``(y, label)``.

    ``x_ticks`` is empty where the template labels the x axis itself.
    """

    series: tuple[Series, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Tick, ...] = ()
    x_ticks: tuple[Tick, ...] = ()
    is_log: bool = False


def _down(scale: Scale) -> tuple[Tick, ...]:
    return tuple((1 - share, label) for share, label in scale.ticks)


def block_plot(
    series: Mapping[str, Mapping[str, float]],
    num_blocks: int,
    *,
    special: Callable[[str, str], bool] = lambda _name, _unit: False,
    lines: Mapping[str, float] | None = None,
) -> Plot:
    """Values by unit (``"3"``, ``"3.attention"``, ``"3.mlp"``), one series per name.

    Args:
        series: Values by the name of the series, then by unit.
        num_blocks: Number of the model's blocks.
        special: Says for a series' name and a unit whether the point stands out.
        lines: Values of horizontal lines, by label.
    """
    lines = lines or {}
    values = [value for units in series.values() for value in units.values()]
    scale = Scale.of([*values, *lines.values()])
    drawn = []
    for number, (name, units) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * 0.14
        marks = tuple(
            Mark(
                (_column(unit) + 0.5 + offset) / num_blocks,
                1 - scale.at(value),
                f"{name}, block {unit}: {value:.4g}",
                special(name, unit),
            )
            for unit, value in units.items()
            if math.isfinite(value)
        )
        drawn.append(Series(name, SHAPES[number % len(SHAPES)], marks))
    across = tuple((1 - scale.at(v), f"{label}: {v:.4g}") for label, v in lines.items())
    return Plot(tuple(drawn), _down(scale), across, is_log=scale.is_log)


def _column(unit: str) -> float:
    """The column of a unit's block; its parts stand left and right of the middle."""
    block, _, part = unit.partition(".")
    return int(block) + {"attention": -0.22, "mlp": 0.22}.get(part, 0.0)


TRIAL_SHAPES: dict[str, Shape] = {
    "compared": "circle",
    "of another size": "triangle",
    "estimate": "square",
}
"""Shapes of a trial's point, by what the trial is compared with."""


@dataclass(frozen=True)
class SearchTrace:
    """Scores over evaluations.

    Attributes:
        plot: Series of candidates of the plan's size, of other sizes, and of estimates.
        best: Corners of the staircase of the best score of the plan's size so far.
        chosen: The point of the plan itself; None if it was not scored here.
        num_candidates: Number of all candidates, including those that the drawing leaves out.
        num_compared: Number of candidates of the plan's size that were scored on all lines.
        best_score: The least of their scores; None if there are none.
    """

    plot: Plot
    best: tuple[tuple[float, float], ...]
    chosen: Mark | None
    num_candidates: int
    num_compared: int
    best_score: float | None


def search_trace(trials: Sequence[TrialRow], plan: PruningPlan) -> SearchTrace | None:
    """The trace of ``trials`` in their order; None if no score is finite."""
    finite = [(index, trial) for index, trial in enumerate(trials) if math.isfinite(trial.score)]
    if not finite:
        return None
    scale = Scale.of(trial.score for _, trial in finite)
    size = tuple(plan.removed(stage) for stage in STAGES)
    most_chunks = max(trial.chunks for trial in trials)

    def place(index: int, score: float) -> tuple[float, float]:
        return index / max(len(trials) - 1, 1), 1 - scale.at(score)

    kinds: dict[str, list[tuple[int, TrialRow]]] = {kind: [] for kind in TRIAL_SHAPES}
    for index, trial in finite:
        kinds[trial.kind(size, most_chunks)].append((index, trial))
    stride = math.ceil(len(trials) / MAX_DOTS)
    series = tuple(
        Series(
            kind,
            TRIAL_SHAPES[kind],
            tuple(Mark(*place(i, t.score), f"{t.score:.4g}") for i, t in rows if i % stride == 0),
        )
        for kind, rows in kinds.items()
    )
    compared = [(index, trial.score) for index, trial in kinds["compared"]]
    mine = [(index, trial.score) for index, trial in kinds["compared"] if trial.is_of(plan)]
    return SearchTrace(
        Plot(series, _down(scale), is_log=scale.is_log),
        tuple(place(*corner) for corner in _staircase(compared, len(trials))),
        Mark(*place(*mine[0]), f"this plan: {mine[0][1]:.4g}") if mine else None,
        len(trials),
        len(compared),
        min((score for _, score in compared), default=None),
    )


def _staircase(scores: Sequence[tuple[int, float]], length: int) -> list[tuple[int, float]]:
    """Corners ``(index, best score so far)`` of a step line to the end of ``length``."""
    corners: list[tuple[int, float]] = []
    for index, score in scores:
        if not corners or score < corners[-1][1]:
            corners += [(index, corners[-1][1])] if corners else []
            corners.append((index, score))
    return [*corners, (length - 1, corners[-1][1])] if corners else []


FRONT_PRICES = {
    "prefill_s": ("prefill", "ms per prompt", 1e3),
    "decode_s": ("decode", "ms per token", 1e3),
    "bytes_sent": ("KV sent", "kB per prompt", 1e-3),
}
"""Names of the prices, with their units, and the number of units per second or byte."""


@dataclass(frozen=True)
class FrontPanel:
    """The front against one price; the first series has other plans, the second this one."""

    title: str
    unit: str
    plot: Plot


def front_panels(rows: Sequence[FrontRow], plan: PruningPlan) -> tuple[FrontPanel, ...]:
    """Panels with the score over each price; none without a front."""
    scores, panels = Scale.of(row.score for row in rows), []
    for field, (title, unit, factor) in FRONT_PRICES.items() if rows else ():
        prices = [factor * getattr(row, field) for row in rows]
        across = Scale.of(prices, linear=True)
        named: dict[str, list[Mark]] = {"other plans": [], "this plan": [], "dense": []}
        for row, price in zip(rows, prices, strict=True):
            words = f"{row}: score {row.score:.4g}, {price:.4g} {unit}"
            mark = Mark(across.at(price), 1 - scores.at(row.score), words)
            kind = "dense" if row.is_dense else "other plans"
            named["this plan" if row.is_of(plan) else kind].append(mark)
        shapes: tuple[Shape, ...] = ("circle", "diamond", "square")
        series = tuple(
            Series(name, shape, tuple(marks))
            for (name, marks), shape in zip(named.items(), shapes, strict=True)
        )
        plot = Plot(series, _down(scores), x_ticks=across.ticks, is_log=scores.is_log)
        panels.append(FrontPanel(title, unit, plot))
    return tuple(panels)


@dataclass(frozen=True)
class KVPath:
    """The sets that a selection moved to, as score over bytes; ``rows`` are the same as text."""

    plot: Plot
    num_steps: int
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def kv_path(steps: Sequence[KVStep]) -> KVPath | None:
    """The path of a selection; None if it made no step."""
    if len(steps) < 2:
        return None
    scores = Scale.of(step.score for step in steps)
    across = Scale.of((step.bytes_sent / 1e3 for step in steps), linear=True)
    marks = tuple(
        Mark(
            across.at(step.bytes_sent / 1e3),
            1 - scores.at(step.score),
            f"{step.phase}: score {step.score:.4g}, {step.reduction:.2f}x fewer bytes",
        )
        for step in steps
    )
    rows = tuple(
        (step.phase, (f"{step.score:.4g}", f"{step.bytes_sent:,}", f"{step.reduction:.2f}x"))
        for step in steps
    )
    series = Series("steps", "circle", marks)
    plot = Plot((series,), _down(scores), x_ticks=across.ticks, is_log=scores.is_log)
    return KVPath(plot, len(steps), rows)


@dataclass(frozen=True)
class LossRow:
    """Points lost on one task: from the mean to the upper bound, as shares of the axis."""

    task: str
    mean_at: float
    upper_at: float
    text: str


@dataclass(frozen=True)
class LossChart:
    """Rows over one axis of percentage points; ``zero_at`` is the place of no loss."""

    rows: tuple[LossRow, ...]
    ticks: tuple[Tick, ...]
    zero_at: float


def loss_chart(result: EvaluationResult) -> LossChart | None:
    """The chart of points lost per task; None without tasks."""
    lines = [*result.tasks, *([result.mean] if result.mean else [])]
    if not lines:
        return None
    ends = [end for line in lines for end in (line.points_lost.mean, line.points_lost.upper)]
    scale = Scale.of([0.0, 1.0, *ends], linear=True)
    rows = tuple(
        LossRow(
            "mean over tasks" if line is result.mean else line.task or "(no task)",
            scale.at(line.points_lost.mean),
            scale.at(line.points_lost.upper),
            f"{line.points_lost.mean:.2f}, at most {line.points_lost.upper:.2f} "
            f"({line.num_examples:,} examples)",
        )
        for line in lines
    )
    return LossChart(rows, scale.ticks, scale.at(0.0))


def removed_units(plan: PruningPlan, stage: Stage) -> frozenset[str]:
    """Units that ``stage`` does not compute: blocks, and the parts of every block."""
    removed: set[str] = set()
    for block, mode in plan.stage(stage).blocks.items():
        gone = {"attention": not mode.attends, "mlp": not mode.has_mlp}
        removed |= {f"{block}.{part}" for part, is_gone in gone.items() if is_gone}
        removed |= {str(block)} if all(gone.values()) else set()
    return frozenset(removed)
