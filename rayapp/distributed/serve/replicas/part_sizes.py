"""How large a part of a prompt's KV must be to be sent before the rest of it is computed."""

from __future__ import annotations

_FIRST_RATE = 1e9
"""Bytes per second until a message has been packed; the first few messages correct it."""
_WEIGHT = 0.2


class PartSizes:
    """Says from how many bytes on sending a part early gains more than its calls cost.

    What a part hides behind computing is the time that its bytes take; what it costs are calls that
    a larger part would not need. So it has to hold as many bytes as are packed within that cost, at
    the rate that this replica has measured (project default).

    Args:
        cost_s: Seconds that the calls for one part take; 0 sends every chunk alone.
    """

    def __init__(self, cost_s: float) -> None:
        self._cost_s = cost_s
        self._rate = _FIRST_RATE

    @property
    def least_bytes(self) -> int:
        """Number of bytes that make a part worth its calls."""
        return int(self._cost_s * self._rate)

    def measured(self, num_bytes: int, seconds: float) -> None:
        """Take note of a message that was packed."""
        if num_bytes and seconds > 0:
            self._rate += _WEIGHT * (num_bytes / seconds - self._rate)
