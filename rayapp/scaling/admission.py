"""Admission: a request that could not begin before its deadline is refused at once."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """Limits of what a service lets in.

    Args:
        max_waiting: Requests that may wait for a decode slot.
        queue_s: Longest wait of a request for its prefill, seconds.
    """

    max_waiting: int
    queue_s: float = math.inf


def refusal(
    room: Room, num_waiting: int, num_new: int = 1, least_work_s: float = 0.0
) -> tuple[str, int] | None:
    """Why new requests are refused, and after how many seconds to ask again; None to admit them.

    Args:
        room: What the service has room for.
        num_waiting: Requests that wait already.
        num_new: Requests that come together.
        least_work_s: Seconds of work before the prefill replica that has the least.
    """
    if num_waiting + num_new > room.max_waiting:
        return (
            f"{num_waiting} requests are waiting, and at most {room.max_waiting} may; "
            "try again later, or ask for fewer answers at once",
            1,
        )
    if least_work_s > room.queue_s:
        return (
            f"{least_work_s:.1f} s of prefill wait before this request, and it may wait for "
            f"{room.queue_s:.1f} s; try again later, or allow more prefill replicas",
            max(1, math.ceil(least_work_s - room.queue_s)),
        )
    return None
