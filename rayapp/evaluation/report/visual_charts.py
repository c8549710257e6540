"""The data of the report's drawings of visual pruning: plain numbers and data URLs."""

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
    """Exact match in percent over kept tokens, one series per method; ``rows`` has it as text.

    Attributes:
        plot: The plot; its line is the dense model, and marks of the plan's own method stand out.
        num_questions: Number of questions in all.
        heads: Headings of the columns of ``rows``.
        rows: Name and cells of every row.
    """

    plot: Plot
    num_questions: int
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def accuracy_chart(quality: VisualQuality, plan: PruningPlan) -> AccuracyChart:
    """The chart of all methods, in the order of their rows."""
    own = plan.visual_tokens.method if plan.visual_tokens else None
    dense = 100 * mean_over_tasks(quality.dense)
    across = Scale.of(quality.budgets)
    up = Scale.of([dense, *(100 * row.mean for row in quality.rows)], linear=True)
    series = []
    for number, method in enumerate(quality.methods):
        rows = sorted((r for r in quality.rows if r.method == method), key=lambda row: row.num_keep)
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
    x_ticks = tuple((across.at(budget), str(budget)) for budget in quality.budgets)
    line = (1 - up.at(dense), f"dense: {dense:.1f} %")
    plot = Plot(tuple(series), y_ticks, (line,), x_ticks, across.is_log)
    heads = ("method, kept", *quality.dense, "mean", "points lost", "at most (95 %)")
    return AccuracyChart(plot, sum(quality.num_examples.values()), heads, _rows(quality))


def _rows(quality: VisualQuality) -> tuple[tuple[str, tuple[str, ...]], ...]:
    shares = (*quality.dense.values(), mean_over_tasks(quality.dense))
    dense = ("dense", (*(f"{share:.1%}" for share in shares), "0.0", "0.0"))
    rows = tuple(
        (
            f"{row.method}, {row.num_keep}",
            (
                *(f"{row.exact_match.get(task, 0.0):.1%}" for task in quality.dense),
                f"{row.mean:.1%}",
                f"{row.mean_lost.mean:.1f}",
                f"{row.mean_lost.upper:.1f}",
            ),
        )
        for row in quality.rows
    )
    return (dense, *rows)


@dataclass(frozen=True)
class Photo:
    """The picture under a grid of tokens; ``name`` is unique on the page, sizes are in tokens."""

    name: str
    url: str
    columns: int
    rows: int


@dataclass(frozen=True)
class KeptPicture:
    """A method's masks over the photos of their places; ``is_match`` says that it was right."""

    method: str
    is_match: bool
    masks: tuple[tuple[Photo, str], ...]


@dataclass(frozen=True)
class SamplePicture:
    """A question, and the tokens that every method keeps of its images."""

    sample: VisualSample
    photos: tuple[Photo, ...]
    methods: tuple[KeptPicture, ...]


def sample_pictures(quality: VisualQuality) -> tuple[SamplePicture, ...]:
    """All samples; a photo is stored once, with one mask per method."""
    pictures = []
    for number, sample in enumerate(quality.samples):
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
