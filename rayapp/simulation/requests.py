"""One simulated request, and the moments of its life."""

from __future__ import annotations

from dataclasses import dataclass

from rayapp.simulation.traces import Arrival


@dataclass(eq=False)
class Request:
    """A request on its way; a moment that has not come is None.

    ``num_left`` counts the answer tokens that decode still computes, and ``entries`` its KV there.
    """

    name: str
    arrival: Arrival
    first_s: float | None = None
    finished_s: float | None = None
    is_refused: bool = False
    num_left: int = 0
    entries: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first_s is None else self.first_s - self.arrival.at_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per further token; 0 for an answer of one token."""
        if self.finished_s is None or self.first_s is None:
            return None
        return (self.finished_s - self.first_s) / max(1, self.arrival.num_answer - 1)
