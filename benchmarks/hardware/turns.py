"""The order in which sides that are compared take turns, so that both see the same machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def in_turns(sides: Sequence[str], num_runs: int) -> Iterator[tuple[str, bool]]:
    """Take every side once per run, in reverse in every second run; the first run is a warm-up.

    Yields:
        A side, and whether its run counts.
    """
    for run in range(num_runs + 1):
        for side in sides if run % 2 else reversed(sides):
            yield side, run > 0
