"""Whether what a service holds stays flat while it is used again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What counts as flat.

    Args:
        share: Most growth of a quantity that never is nothing, as a share.
        slack: Growth below this is no growth, whatever its share, in the quantity's unit.
    """

    share: float
    slack: float


def judged(values: Sequence[float], limits: Limits | None) -> dict[str, Any]:
    """Judge the values of one quantity, one for every time that the service was idle.

    A quantity is judged by the medians of the middle third of its values and of the last; the first
    third warms it up. Without limits it must be nothing whenever the service is idle.

    Returns:
        The values, ``before`` and ``after``, and whether it ``is_flat``.
    """
    third = max(1, len(values) // 3)
    before, after = median(values[-2 * third : -third] or values), median(values[-third:])
    if limits is None:
        is_flat = not any(values)
    else:
        is_flat = after - before <= max(limits.slack, limits.share * before)
    return {"values": list(values), "before": before, "after": after, "is_flat": is_flat}
