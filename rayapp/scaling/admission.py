"""Admission: a request that could not begin before its deadline is refused at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Room:
    """Limits of what a service lets in.

    Args:
        max_waiting: Requests that may wait for a decode slot.
        queue_s: Longest wait of a request for a stage, seconds.
    """

    max_waiting: int
    queue_s: float = math.inf


def refusal(
    room: Room,
    num_waiting: int,
    num_new: int = 1,
    waits_s: Mapping[str, float] = MappingProxyType({}),
) -> tuple[str, int] | None:
    """Why new requests are refused, and after how many seconds to ask again; None to admit them.

    Args:
        room: What the service has room for.
        num_waiting: Requests that wait already.
        num_new: Requests that come together.
        waits_s: Seconds until a stage begins the last of them, by the name of the stage.
    """
    if num_waiting + num_new > room.max_waiting:
        return (
            f"{num_waiting} requests are waiting, and at most {room.max_waiting} may; "
            "try again later, or ask for fewer answers at once",
            1,
        )
    stage = max(waits_s, key=lambda name: waits_s[name], default="")
    if stage and waits_s[stage] > room.queue_s:
        return (
            f"{waits_s[stage]:.1f} s of {stage} wait before the last of this request, and it may "
            f"wait for {room.queue_s:.1f} s; try again later, ask for less at once, or allow more "
            f"{stage} replicas",
            max(1, math.ceil(waits_s[stage] - room.queue_s)),
        )
    return None
