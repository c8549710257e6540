"""Pictures of single values: rows of names with a mark per series, or two numbers against another.

A page shows one where its table has too many rows to be read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

_MARKERS = "osD^v"
_ROW_INCHES, _PANEL_INCHES = 0.3, 0.95


@dataclass(frozen=True)
class Marks:
    """The marks of one series; ``y`` are numbers, or the names of the panel's rows."""

    name: str
    x: Sequence[float]
    y: Sequence[float] | Sequence[str]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: What is compared.
        x: Name of the horizontal axis.
        marks: The series, in the order of the legend.
        rows: Names down the side, first at the top; none where the vertical axis is numeric.
        y: Name of the vertical axis, where it is numeric.
        x_ticks: Where the horizontal axis is labelled, from end to end; none leaves it to the
            drawing library.
        y_ticks: Likewise, of a numeric vertical axis.
        is_log: Whether the horizontal axis is logarithmic.
    """

    title: str
    x: str
    marks: Sequence[Marks]
    rows: Sequence[str] = ()
    y: str = ""
    x_ticks: Sequence[float] = ()
    y_ticks: Sequence[float] = ()
    is_log: bool = False

    @property
    def height(self) -> float:
        """Inches that the panel needs."""
        return _PANEL_INCHES + (_ROW_INCHES * len(self.rows) if self.rows else 4.0)


@dataclass(frozen=True)
class Dots:
    """Panels below each other; series of equal names share mark and colour.

    Attributes:
        title: What the picture shows, for readers who cannot see it.
        panels: From top to bottom.
    """

    title: str
    panels: Sequence[Panel]

    def svg(self, salt: str) -> str:
        """The drawing; the same for the same numbers and salt."""
        heights = [panel.height for panel in self.panels]
        figure = Figure(figsize=(8, 0.5 + sum(heights)), layout="constrained")
        every = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
        names = dict.fromkeys(marks.name for panel in self.panels for marks in panel.marks)
        for panel, axes in zip(self.panels, every[:, 0], strict=True):
            _draw(axes, panel, list(names))
        handles = {
            label: handle
            for axes in every[:, 0]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles, loc="outside upper center", ncols=len(names), frameon=False
        )
        target = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": salt}):
            figure.savefig(target, format="svg", metadata={"Date": None})
        return target.getvalue()


def _draw(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    colours = matplotlib.colormaps["tab10"]
    places = {row: number for number, row in enumerate(panel.rows)}
    for marks in panel.marks:
        number = names.index(marks.name)
        axes.plot(
            marks.x,
            [places[row] for row in marks.y] if panel.rows else marks.y,
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=7,
            alpha=0.8,
            color=colours(number % 10),
            label=marks.name,
        )
    if panel.is_log:
        axes.set_xscale("log")
    if panel.x_ticks:
        axes.set_xticks(panel.x_ticks, [f"{tick:g}" for tick in panel.x_ticks])
        axes.set_xlim(panel.x_ticks[0], panel.x_ticks[-1])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if panel.rows:
        axes.set_yticks(range(len(panel.rows)), panel.rows)
        axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    else:
        axes.set_ylabel(panel.y)
        if panel.y_ticks:
            axes.set_yscale("symlog", linthresh=1)
            axes.set_yticks(panel.y_ticks, [f"{tick:g}" for tick in panel.y_ticks])
            axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(panel.title, fontsize="medium", loc="left")
    axes.set_xlabel(panel.x)
    axes.grid(alpha=0.3)
