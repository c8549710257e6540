"""The progress of a search: numbers for a callback, a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

logger = logging.getLogger(__name__)

LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class SearchProgress:
    """The state of a search at one moment.

    Attributes:
        done: Number of candidates scored in this run; fractions count candidates scored on some
            chunks.
        replayed: Number of candidates whose scores came from the journal.
        left: Most candidates that are still to be scored.
        seconds: Seconds since this run began.
        phase: The phase that the method is in.
        best: The best candidate so far, in words, or None.
        best_score: Its score.
        num_evaluators: Number of evaluators that are alive.
        units: While healing goes on: the numbers of learnt pairs and fits, and of those still to
            train.
    """

    done: float
    replayed: int
    left: float
    seconds: float
    phase: str
    best: str | None
    best_score: float | None
    num_evaluators: int
    units: tuple[int, int] | None = None

    @property
    def rate(self) -> float:
        """Scored candidates per second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def left_s(self) -> float | None:
        """Most seconds to go at this rate; None before the first candidate is scored."""
        return self.left / self.rate if self.rate and self.done >= 1 else None

    def line(self) -> str:
        """The progress in one line for people."""
        best = (
            f"best {self.best_score:.5g} {self.best}"
            if self.best_score is not None
            else "no plan yet"
        )
        time_left = "?" if self.left_s is None else f"{self.left_s:.0f} s"
        phase = self.phase
        if self.units is not None:
            phase += f", healing ({self.units[0]} done, {self.units[1]} left)"
        return (
            f"{phase}: {self.replayed + self.done:.0f} scored, at most {self.left:.0f} left, "
            f"{self.rate:.2f}/s, {time_left} left, {self.num_evaluators} evaluators, {best}"
        )


ProgressCallback = Callable[[SearchProgress], None]


class ProgressReport:
    """A callback that shows progress: a bar on a terminal, log lines elsewhere.

    It is a context manager: ``with ProgressReport() as report: run_search(...,
    on_progress=report)``.
    """

    def __init__(
        self, console: Console | None = None, *, line_every_s: float = LINE_EVERY_S
    ) -> None:
        self._console = console or Console(stderr=True)
        self._line_every_s = line_every_s
        self._last_line_s = float("-inf")
        self._unsaid: SearchProgress | None = None
        self._bar = Progress(
            BarColumn(), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> ProgressReport:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        if self._unsaid:
            logger.info(self._unsaid.line())

    def __call__(self, progress: SearchProgress) -> None:
        """Show ``progress``; lines come at most every ``line_every_s``, and at the end."""
        if self._console.is_terminal:
            done = progress.replayed + progress.done
            self._bar.update(
                self._task, description=progress.line(), completed=done, total=done + progress.left
            )
        elif time.monotonic() - self._last_line_s >= self._line_every_s:
            self._last_line_s, self._unsaid = time.monotonic(), None
            logger.info(progress.line())
        else:
            self._unsaid = progress
