"""What time it is for a measurement."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds between marks: wall time with the device idle, or CPU time of this process."""

    def __init__(self, device: torch.device, kind: str) -> None:
        self._cuda = device.type == "cuda"
        self._now = time.process_time if kind == "cpu" else time.perf_counter
        self._last = self._read()

    def lap(self) -> float:
        """Seconds since the last mark, which is now."""
        before, self._last = self._last, self._read()
        return self._last - before

    def _read(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return self._now()
