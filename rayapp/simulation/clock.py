"""The clock of a simulation: events in the order of their times, and of their making."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """Calls what was put on it when its moment comes.

    Attributes:
        now_s: The present time, seconds from the begin of the trace.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, moment_s: float, event: Callable[[], None]) -> None:
        """Call ``event`` at a moment, or at once if it has passed."""
        heapq.heappush(self._events, (max(moment_s, self.now_s), next(self._numbers), event))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Call events until there is none, or until ``is_over`` says so."""
        while self._events and not is_over():
            self.now_s, _, event = heapq.heappop(self._events)
            event()
