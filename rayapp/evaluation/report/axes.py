"""Scales of the report's plots: they place a value on the axis, and choose the ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LOG_FROM_RATIO = 10.0
"""Smallest ratio of the largest to the smallest value that makes an axis logarithmic."""
ZERO_SHARE = 0.12
"""Share of a logarithmic axis that lies between its smallest value and a zero below it."""
_LARGEST = 1e300  # so that no difference of two values overflows
_NUM_STEPS = 4
_MAX_DECADES = 8

Tick = tuple[float, str]
"""A tick: its share of the axis, and its label."""


@dataclass(frozen=True)
class Scale:
    """An axis from ``low`` to ``high``; if it is logarithmic, zero has a place below it."""

    low: float
    high: float
    is_log: bool = False
    has_zero: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, linear: bool = False) -> Scale:
        """The axis that all finite ``values`` (below 1e300) fit on; 0 to 1 if there are none.

        It is logarithmic if no value is negative and the positive ones span a wide range, unless
        ``linear`` is set.
        """
        finite = [value for value in values if abs(value) < _LARGEST]
        if not finite:
            return cls(0.0, 1.0)
        positive = [value for value in finite if value > 0]
        wide = len(positive) > 1 and max(positive) / min(positive) > LOG_FROM_RATIO
        if wide and not linear and min(finite) >= 0:
            return cls(min(positive), max(positive), True, min(finite) == 0)
        low, high = min(finite), max(finite)
        if low == high:
            margin = abs(low) / 2 or 0.5
            low, high = low - margin, high + margin
        return cls(low, high)

    def at(self, value: float) -> float:
        """The place of ``value``: 0 at the low end, 1 at the high end, and never outside."""
        if not self.is_log:
            return _within((value - self.low) / (self.high - self.low))
        if not value > 0:
            return 0.0
        start = ZERO_SHARE if self.has_zero else 0.0
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return start + (1 - start) * _within(share)

    @property
    def ticks(self) -> tuple[Tick, ...]:
        """Ticks at round values within the axis, ascending, with the zero of a logarithmic one."""
        zero: list[Tick] = [(0.0, "0")] if self.is_log and self.has_zero else []
        values = self._decades() if self.is_log else self._steps()
        return (*zero, *((self.at(value), _label(value)) for value in values))

    def _decades(self) -> list[float]:
        """Powers of ten; fewer than three are filled up with their doubles and fives."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 2, 5)):
            values = [f * 10.0**p for p in range(first, last + 1) for f in factors]
            inside = [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
            if len(inside) >= 3:
                break
        return inside[:: math.ceil(len(inside) / _MAX_DECADES)] if inside else []

    def _steps(self) -> list[float]:
        rough = (self.high - self.low) / _NUM_STEPS
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough * 0.8)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _within(share: float) -> float:
    return 0.0 if math.isnan(share) else min(max(share, 0.0), 1.0)


def _label(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1_000 else f"{value:,.0f}"
