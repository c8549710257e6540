"""What all ingress replicas have counted together, those that have died included.

Every replica counts for itself. Whoever is asked for the sums asks its siblings, and every one of
them answers for itself and for those that it has heard of. So the numbers of a replica that has
died stay as they were last read, and no sum runs backwards while one replica lives that has read
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rayapp.api.service import Counts
from rayapp.distributed.serve.ingress.calls import ask_all
from rayapp.kv.ledger import Ledger


@dataclass(frozen=True)
class Tally:
    """What one ingress replica had counted ``at_s`` on its own clock."""

    at_s: float
    ledger: Ledger
    counts: Counts = field(default_factory=dict)


Tallies = dict[str, Tally]
"""The latest tallies that a replica knows, by the name of the replica that counted."""


class Siblings:
    """The tallies of all ingress replicas.

    Args:
        name: The name of this replica.
        handle: Serve's handle of the ingress.
        ledger: The ledger of this replica.
        counted: What this replica has counted by now.
    """

    def __init__(
        self, name: str, handle: Any, ledger: Ledger, counted: Callable[[], Counts]
    ) -> None:
        self._name = name
        self._handle = handle
        self._ledger = ledger
        self._counted = counted
        self._known: Tallies = {}

    def own(self) -> Tallies:
        """This replica's tally, and the latest of others that it has heard of."""
        mine = Tally(time.monotonic(), self._ledger, self._counted())
        return {**self._known, self._name: mine}

    async def others(self) -> Tallies:
        """Ask all replicas, and return the latest tally of every one but this."""
        for told in await ask_all(self._handle, "tallies"):
            self.hear(told)
        return dict(self._known)

    def hear(self, told: Tallies) -> None:
        """Remember tallies that are newer than those known."""
        for name, tally in told.items():
            known = self._known.get(name)
            if name != self._name and (known is None or known.at_s < tally.at_s):
                self._known[name] = tally
