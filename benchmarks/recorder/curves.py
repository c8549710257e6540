"""Ratios as curves over a logarithmic axis with marked places: where a technique begins to pay."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

_STYLES = ("-", "--", "-.", ":")
_PANEL_INCHES = 3.6
_RATIOS = (0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 3, 5, 7, 10, 20, 50, 100)


@dataclass(frozen=True)
class Curve:
    """One curve, named in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class CurvePanel:
    """One pair of axes.

    Attributes:
        title: What is compared.
        x: Name of the horizontal axis, which is logarithmic.
        y: Name of the vertical axis, which is logarithmic too: its numbers are ratios.
        curves: The curves, in the order of the legend.
        marks: Vertical lines by their label.
        level: A horizontal line to compare with.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    marks: Mapping[str, float]
    level: float = 1.0


@dataclass(frozen=True)
class Curves:
    """Panels in rows; curves of equal names share colour and style.

    Attributes:
        title: What the picture shows, for readers who cannot see it.
        panels: From left to right, then from top to bottom.
        num_columns: Panels in a row, which share their vertical axis.
    """

    title: str
    panels: Sequence[CurvePanel]
    num_columns: int = 1

    def svg(self, salt: str) -> str:
        """The drawing; the same for the same numbers and salt. Its ground is white in any theme."""
        rows = -(-len(self.panels) // self.num_columns)
        size = (3 + 4.2 * self.num_columns, 0.7 + _PANEL_INCHES * rows)
        figure = Figure(figsize=size, layout="constrained")
        every = figure.subplots(rows, self.num_columns, squeeze=False, sharey="row").flat
        names = list(dict.fromkeys(c.name for panel in self.panels for c in panel.curves))
        for number, (panel, axes) in enumerate(zip(self.panels, every, strict=True)):
            begin = number - number % self.num_columns
            _draw(axes, panel, names, _limits(self.panels[begin : begin + self.num_columns]))
        handles = every[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
        target = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": salt}):
            figure.savefig(target, format="svg", metadata={"Date": None}, facecolor="white")
        return target.getvalue()


def _limits(row: Sequence[CurvePanel]) -> tuple[float, float]:
    """Ends of the vertical axis that the panels of a row share."""
    values = [y for panel in row for curve in panel.curves for y in curve.y]
    return 0.95 * min(*values, 0.9), 1.1 * max(*values, 1.2)


def _draw(axes: Axes, panel: CurvePanel, names: Sequence[str], limits: tuple[float, float]) -> None:
    colours = matplotlib.colormaps["tab10"]
    for curve in panel.curves:
        number = names.index(curve.name)
        axes.plot(
            curve.x,
            curve.y,
            color=colours(number % 10),
            linestyle=_STYLES[number // 2 % len(_STYLES)],
            linewidth=1.8,
            label=curve.name,
        )
    axes.axhline(panel.level, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(panel.curves[0].x[0], panel.curves[0].x[-1])
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    ticks = [ratio for ratio in _RATIOS if limits[0] <= ratio <= limits[1]]
    axes.set_yticks(ticks, [f"{ratio:g}x" for ratio in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    for label, place in panel.marks.items():
        axes.axvline(place, color="grey", linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            label, (place, 1), xycoords=("data", "axes fraction"), xytext=(2, -3),
            textcoords="offset points", rotation=90, va="top", fontsize="small", color="dimgrey",
        )  # fmt: skip
    axes.set_title(panel.title, fontsize="medium", loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(alpha=0.3)
