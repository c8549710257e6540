"""The best rates that a device reaches, which bound every measured step from below."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardware.clock import Clock

_REPEATS = 10


@dataclass(frozen=True)
class Rates:
    """The rates of one big product and one big copy."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Least seconds of some work: the longer of its operations and its bytes."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def measured_rates(device: torch.device, dtype: torch.dtype, clock: str = "wall") -> Rates:
    """Both rates on the clock of the timed runs, ``wall`` or ``cpu``."""
    return Rates(product_flops_per_s(device, dtype, clock), copy_bytes_per_s(device, clock))


def product_flops_per_s(device: torch.device, dtype: torch.dtype, clock: str = "wall") -> float:
    """Operations per second of one big product: the bound of everything compute-bound."""
    side = 8192 if device.type == "cuda" else 1024
    left = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(_REPEATS):
        timer = Clock(device, clock)
        left @ left
        seconds.append(timer.lap())
    return 2 * side**3 / min(seconds)


def copy_bytes_per_s(device: torch.device, clock: str = "wall") -> float:
    """Bytes read and written per second by one big copy: the bound of everything memory-bound."""
    length = 1 << 28 if device.type == "cuda" else 1 << 24
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_REPEATS):
        timer = Clock(device, clock)
        target.copy_(source)
        seconds.append(timer.lap())
    return 2 * source.nbytes / min(seconds)
