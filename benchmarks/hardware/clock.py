"""Clocks of a measurement: wall time and CPU time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moment:
    """Wall and CPU seconds at a moment at which the device was idle."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls, device: torch.device) -> Moment:
        """Wait for the device, then read both clocks."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return cls(time.perf_counter(), time.process_time())

    def since(self, earlier: Moment) -> Moment:
        """The seconds between two moments."""
        return Moment(self.wall_s - earlier.wall_s, self.cpu_s - earlier.cpu_s)


class Clock:
    """Seconds between marks: wall time with the device idle, or CPU time of this process."""

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        self._device, self._field = device, f"{kind}_s"
        self._last = Moment.now(device)

    def lap(self) -> float:
        """Seconds since the last mark, which is now."""
        before, self._last = self._last, Moment.now(self._device)
        seconds: float = getattr(self._last.since(before), self._field)
        return seconds
