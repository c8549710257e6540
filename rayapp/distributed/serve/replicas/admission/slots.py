"""The slots of a decode replica: how many answers run at once, and the news that room was made."""

from __future__ import annotations

import asyncio


class Slots:
    """Places of running answers, given in the order in which they were asked for.

    Args:
        num_slots: Answers that may run at once.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = asyncio.Semaphore(num_slots)
        self._num_withheld = self._num_to_withhold = 0
        self._news = asyncio.Event()
        self.num_slots = num_slots
        self.num_held = 0

    @property
    def is_any_free(self) -> bool:
        """True if a slot can be had without waiting."""
        return not self._free.locked()

    @property
    def num_usable(self) -> int:
        """Number of slots that are or will be given, held ones included."""
        return self.num_slots - self._num_to_withhold

    async def take(self) -> None:
        """Wait for a slot and hold it."""
        await self._free.acquire()
        self.num_held += 1

    def give(self) -> None:
        """Give a slot back, unless it is to be withheld from now on."""
        self.num_held -= 1
        if self._num_withheld < self._num_to_withhold:
            self._num_withheld += 1
        else:
            self._free.release()
        self.tell()

    def keep_to(self, num_slots: int) -> None:
        """Give at most ``num_slots``, but one, from now on; those that are held may be more."""
        withheld = self.num_slots - max(1, num_slots)
        self._num_to_withhold = max(self._num_to_withhold, withheld)

    @property
    def news(self) -> asyncio.Event:
        """An event that is set when room is made the next time.

        It is to be read before one looks for room, and waited for if there was none: so nobody
        misses room that is made while they look.
        """
        return self._news

    def tell(self) -> None:
        """Tell all who wait that room may have been made."""
        self._news.set()
        self._news = asyncio.Event()
