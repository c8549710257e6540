"""Line charts of a page, drawn from the numbers of its record."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

_MARKERS = "os^Dv"


@dataclass(frozen=True)
class Line:
    """One line of a chart; the main one is drawn heavier."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_main: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over an axis that doubles from tick to tick, named at the right in their order.

    Attributes:
        title: A description of the picture, for readers who cannot see it.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        lines: The lines, in the order in which they are named.
        level: A horizontal line to compare with, by its name.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    level: tuple[str, float] | None = None

    def svg(self, salt: str) -> str:
        """The drawing; the same for the same numbers and salt."""
        figure = Figure(figsize=(9, 5.4), layout="constrained")
        axes = figure.subplots()
        self._draw(axes)
        figure.legend(loc="outside right center", frameon=False)
        target = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": salt}):
            figure.savefig(target, format="svg", metadata={"Date": None})
        return target.getvalue()

    def _draw(self, axes: Axes) -> None:
        colours = matplotlib.colormaps["tab20"]
        for number, line in enumerate(self.lines):
            axes.plot(
                line.x,
                line.y,
                marker=_MARKERS[number % len(_MARKERS)],
                color=colours(number * 2 % 20 + number // 10),
                linewidth=2.4 if line.is_main else 1.1,
                markersize=5,
                label=line.name,
            )
        if self.level:
            name, height = self.level
            axes.axhline(height, color="black", linestyle="--", linewidth=1, label=name)
        ticks = sorted({value for line in self.lines for value in line.x})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        axes.grid(alpha=0.3)
