"""The pictures of a paper: the cost of every block, and quality against measured speed.

Invariant: drawings are SVG with a transparent ground, and with lines and letters of a grey that can
be read on white and on black, so that one file serves light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from rayapp.plan import STAGES, Stage

GREY = "#7d8590"
"""Colour of letters and axes: contrast above 3.7 on white and on the dark pages of code hosts."""
_MARKERS = "osD^vPX*<>"
_COLOURS = {"prefill": "#2f81f7", "decode": "#e8590c"}
_STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "grid.color": GREY,
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.titlecolor": GREY,
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class BlockMap:
    """KL of every block taken away alone, a panel per stage, prefill above decode.

    Attributes:
        title: What is shown, for readers who cannot see it.
        prefill: Values by calibration set, then by block, in nats per token.
        decode: The same of decode.
    """

    title: str
    prefill: Sequence[Sequence[float]]
    decode: Sequence[Sequence[float]]

    def svg(self, salt: str) -> str:
        """The drawing; the same for the same numbers and salt."""
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
            figure = Figure(figsize=(9, 5.2), layout="constrained")
            panels = figure.subplots(2, 1, sharex=True, sharey=True)
            for stage, axes in zip(STAGES, panels, strict=True):
                self._draw(axes, stage)
            panels[1].set_xlabel("block taken away")
            return _written(figure)

    def _draw(self, axes: Axes, stage: Stage) -> None:
        sets = self.prefill if stage == "prefill" else self.decode
        by_block = list(zip(*sets, strict=True))
        blocks, colour = range(len(by_block)), _COLOURS[stage]
        means = [sum(values) / len(values) for values in by_block]
        lows, highs = ([pick(values) for values in by_block] for pick in (min, max))
        axes.fill_between(blocks, lows, highs, color=colour, alpha=0.25, linewidth=0)
        axes.plot(blocks, means, color=colour, marker="o", markersize=4, linewidth=1.5)
        axes.set_yscale("log")
        axes.set_ylabel(f"{stage}\nKL, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(-0.5, len(by_block) - 0.5)
        axes.grid(alpha=0.25)


@dataclass(frozen=True)
class Mark:
    """One plan: its method, its speed, and what it keeps.

    Attributes:
        method: Name of the method in the legend.
        missed: Blocks that prefill and decode miss.
        healed: Whether it is healed; healed marks are filled.
        speedup: Dense over plan of the time to the first token.
        kept: Share of the margin above chance that is kept, in per cent; None without any task.
        perplexity: Plan over dense, in per cent above 100; None without any text.
    """

    method: str
    missed: tuple[float, float]
    healed: bool
    speedup: float
    kept: float | None = None
    perplexity: float | None = None

    @property
    def label(self) -> str:
        """The sizes in a few letters: ``p8`` or ``p8 d2``."""
        sizes = zip("pd", self.missed, strict=True)
        return " ".join(f"{stage}{count:g}" for stage, count in sizes if count)


@dataclass(frozen=True)
class QualitySpeed:
    """Quality that plans keep, against how much faster their first token comes; up is better.

    Attributes:
        title: What is shown, for readers who cannot see it.
        marks: The plans.
    """

    title: str
    marks: Sequence[Mark]

    def svg(self, salt: str) -> str:
        """The drawing; the same for the same numbers and salt."""
        panels: list[tuple[str, Callable[[Mark], float | None]]] = [
            ("margin above chance kept, %", lambda mark: mark.kept),
            ("perplexity lost, %", lambda mark: mark.perplexity),
        ]
        shown = [p for p in panels if any(p[1](mark) is not None for mark in self.marks)]
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
            figure = Figure(figsize=(9, 1 + 3.6 * max(len(shown), 1)), layout="constrained")
            every = figure.subplots(max(len(shown), 1), 1, sharex=True, squeeze=False)[:, 0]
            for (name, value), axes in zip(shown, every, strict=False):
                self._draw(axes, name, value)
            if shown and shown[-1] is panels[-1]:
                every[-1].invert_yaxis()  # up is better in both panels
            every[-1].set_xlabel("times faster to the first token")
            handles, labels = every[0].get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9
            )
            return _written(figure)

    def _draw(self, axes: Axes, name: str, value: Callable[[Mark], float | None]) -> None:
        methods = list(dict.fromkeys(mark.method for mark in self.marks))
        colours = matplotlib.colormaps["tab10"]
        for (method, healed), marks in _grouped(self.marks).items():
            number = methods.index(method)
            points = [(mark.speedup, y, mark) for mark in marks if (y := value(mark)) is not None]
            of_prefill = sorted((x, y) for x, y, mark in points if not mark.missed[1])
            axes.plot(
                [x for x, _ in of_prefill],
                [y for _, y in of_prefill],
                color=colours(number % 10),
                linewidth=1,
                linestyle="-" if healed else ":",
            )
            axes.plot(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                linestyle="none",
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=7,
                color=colours(number % 10),
                markerfacecolor=colours(number % 10) if healed else "none",
                label=f"{method}, healed" if healed else method,
            )
            for x, y, mark in points:
                axes.annotate(
                    mark.label, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7
                )
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)


def _grouped(marks: Sequence[Mark]) -> dict[tuple[str, bool], list[Mark]]:
    groups: dict[tuple[str, bool], list[Mark]] = {}
    for mark in marks:
        groups.setdefault((mark.method, mark.healed), []).append(mark)
    return groups


def _written(figure: Figure) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True)
    return target.getvalue()
