"""What the report draws of a comparison of visual pruning: plain numbers and data URLs."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from rayapp.evaluation.report.axes import Scale
from rayapp.evaluation.report.plots import SHAPES, Mark, Plot, Series
from rayapp.evaluation.visual.pictures import mask
from rayapp.evaluation.visual.result import View, VisualQuality, VisualSample, mean_over_tasks
from rayapp.plan import PruningPlan

NUM_COLOURS = 5


@dataclass(frozen=True)
class AccuracyChart:
    """Exact match in percent over kept tokens, one series per method; ``rows`` say it in text.

    Attributes:
        plot: Its line is the dense model; marks of the plan's own method stand out.
        num_questions: In all.
        heads: Of the columns of ``rows``.
        rows: Name and cells of each.
    """

    plot: Plot
    num_questions: int
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def accuracy_chart(found: VisualQuality, plan: PruningPlan) -> AccuracyChart:
    """Of all methods, in the order of their rows."""
    own = plan.visual_tokens.method if plan.visual_tokens else None
    dense = 100 * mean_over_tasks(found.dense)
    across = Scale.of(found.budgets)
    up = Scale.of([dense, *(100 * row.mean for row in found.rows)], linear=True)
    series = []
    for number, method in enumerate(found.methods):
        rows = sorted((r for r in found.rows if r.method == method), key=lambda row: row.num_keep)
        marks = tuple(
            Mark(
                across.at(row.num_keep),
                1 - up.at(100 * row.mean),
                f"{method}, {row.num_keep} kept: {row.mean:.1%}, at most "
                f"{row.mean_lost.upper:.1f} points lost",
                method == own,
            )
            for row in rows
        )
        series.append(Series(method, SHAPES[number // NUM_COLOURS % len(SHAPES)], marks))
    y_ticks = tuple((1 - share, label) for share, label in up.ticks)
    x_ticks = tuple((across.at(budget), str(budget)) for budget in found.budgets)
    line = (1 - up.at(dense), f"dense: {dense:.1f} %")
    plot = Plot(tuple(series), y_ticks, (line,), x_ticks, across.is_log)
    heads = ("method, kept", *found.dense, "mean", "points lost", "at most (95 %)")
    return AccuracyChart(plot, sum(found.num_examples.values()), heads, _rows(found))


def _rows(found: VisualQuality) -> tuple[tuple[str, tuple[str, ...]], ...]:
    shares = (*found.dense.values(), mean_over_tasks(found.dense))
    dense = ("dense", (*(f"{share:.1%}" for share in shares), "0.0", "0.0"))
    rows = tuple(
        (
            f"{row.method}, {row.num_keep}",
            (
                *(f"{row.exact_match.get(task, 0.0):.1%}" for task in found.dense),
                f"{row.mean:.1%}",
                f"{row.mean_lost.mean:.1f}",
                f"{row.mean_lost.upper:.1f}",
            ),
        )
        for row in found.rows
    )
    return (dense, *rows)


@dataclass(frozen=True)
class Photo:
    """What a grid of tokens shows; ``name`` is unique on the page, sizes are in tokens."""

    name: str
    url: str
    columns: int
    rows: int


@dataclass(frozen=True)
class KeptPicture:
    """One method's masks, each over the photo of its place; ``is_match``: it answered rightly."""

    method: str
    is_match: bool
    masks: tuple[tuple[Photo, str], ...]


@dataclass(frozen=True)
class SamplePicture:
    """A question and what every method keeps of its images."""

    sample: VisualSample
    photos: tuple[Photo, ...]
    methods: tuple[KeptPicture, ...]


def sample_pictures(found: VisualQuality) -> tuple[SamplePicture, ...]:
    """Every sample; a photo is there once, and a mask for each method."""
    pictures = []
    for number, sample in enumerate(found.samples):
        photos = tuple(
            Photo(f"photo-{number}-{place}", _url(view.photo), view.columns, view.rows)
            for place, view in enumerate(sample.views)
        )
        methods = tuple(
            KeptPicture(method, is_match, _masks(method, sample.views, photos))
            for method, is_match in sample.is_match.items()
        )
        pictures.append(SamplePicture(sample, photos, methods))
    return tuple(pictures)


def _masks(
    method: str, views: tuple[View, ...], photos: tuple[Photo, ...]
) -> tuple[tuple[Photo, str], ...]:
    return tuple(
        (photo, _url(mask(view.rows, view.columns, view.kept[method])))
        for photo, view in zip(photos, views, strict=True)
        if method in view.kept
    )


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
