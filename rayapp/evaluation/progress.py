"""Progress of a long measurement, on a terminal as a bar and in a log as lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ProgressCallback = Callable[[str, int, int], None]
"""A callback with the current work, the number of its finished steps, and the number of all of
them."""

_LINE_EVERY_S = 10.0


def silent(_what: str, _done: int, _total: int) -> None:
    """Ignore the progress."""


@contextmanager
def shown_progress(console: Console | None = None) -> Iterator[ProgressCallback]:
    """A callback that draws on ``console`` (standard error if None): bars, or lines in a log."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _line_writer(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield _bar_mover(bars)


def _bar_mover(bars: Progress) -> ProgressCallback:
    known = {}

    def move(what: str, done: int, total: int) -> None:
        if what not in known:
            known[what] = bars.add_task(what, total=total)
        bars.update(known[what], completed=done, total=total)

    return move


def _line_writer(console: Console) -> ProgressCallback:
    """A callback that writes lines at the start, at the end, and every few seconds between.

    Between, a line tells the rate since the start, and the time that is left at this rate.
    """
    last_s: dict[str, float] = {}
    begun: dict[str, tuple[float, int]] = {}

    def write(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what in last_s and done < total and now - last_s[what] < _LINE_EVERY_S:
            return
        last_s[what] = now
        began_s, before = begun.setdefault(what, (now, done))
        told = _pace(done - before, now - began_s, total - done)
        console.print(f"{what}: {done}/{total}{told}", highlight=False, soft_wrap=True)

    return write


def _pace(num_done: int, seconds: float, num_left: int) -> str:
    """The rate and the time left in words; empty at the start and at the end."""
    if not (num_done and seconds and num_left):
        return ""
    rate = num_done / seconds
    return f", {rate:.3g} a second, {num_left / rate:,.0f} s left"
