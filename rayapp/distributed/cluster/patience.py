"""Patience with a cluster: what is slow may go on and is told, what can never end fails soon."""

from __future__ import annotations

import logging
import time

from rayapp.errors import ClusterError

logger = logging.getLogger(__name__)

TELL_EVERY_S = 10.0
"""How often a wait says what it waits for (project default)."""
HOPELESS_S = 20.0
"""How long a wait that no node can end goes on: nodes may still be joining (project default)."""


class Patience:
    """One wait, from its start on.

    Args:
        limit_s: When to give up what is merely slow; None never does.
        hopeless_s: When to give up what no node of the cluster can end.
    """

    def __init__(self, *, limit_s: float | None = None, hopeless_s: float = HOPELESS_S) -> None:
        self._limit_s, self._hopeless_s = limit_s, hopeless_s
        self._began_s = self._told_s = self._possible_s = time.monotonic()

    @property
    def pause_s(self) -> float:
        """How long a caller may sleep before it asks again."""
        return min(TELL_EVERY_S, self._hopeless_s)

    @property
    def is_due(self) -> bool:
        """Whether it is time to look closer, and to say what is waited for."""
        return time.monotonic() - self._told_s >= self.pause_s

    def go_on(self, awaited: str, *, never: str | None = None) -> None:
        """Say what is waited for where that is due, or give up.

        Args:
            awaited: What has not happened yet, and whose turn it is.
            never: Why it cannot happen on this cluster as it is; None where it can.

        Raises:
            ClusterError: ``never`` has held for too long, or the limit is over.
        """
        now_s = time.monotonic()
        waited_s = now_s - self._began_s
        if never is None:
            self._possible_s = now_s
        elif now_s - self._possible_s >= self._hopeless_s:
            raise ClusterError(never)
        if self._limit_s is not None and waited_s >= self._limit_s:
            raise ClusterError(f"gave up after {waited_s:.0f} s: {awaited}")
        if self.is_due:
            self._told_s = now_s
            logger.warning("waiting for %.0f s: %s", waited_s, awaited)
