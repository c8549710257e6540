"""The pictures of a paper: the cost of every block, and quality against measured speed.

Invariant: drawings are SVG with a transparent ground, and with lines and letters of a grey that can
be read on white and on black, so that one file serves light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from rayapp.plan import STAGES, Stage

GREY = "#7d8590"
"""Colour of letters and axes: contrast above 3.7 on white and on the dark pages of code hosts."""
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


def _written(figure: Figure) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True)
    return target.getvalue()
