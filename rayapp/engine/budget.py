"""A limit on bytes under way: whoever needs room waits for it, in the order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class ByteBudget:
    """Counts pinned bytes against a limit; more than the limit passes alone.

    Nobody overtakes: what came first gets the first room, however much it needs.

    Args:
        max_bytes: Limit of pinned bytes, None for no limit.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.pinned_bytes = 0
        self._turn = asyncio.Lock()  # A lock serves its waiters in the order of their arrival.
        self._given = asyncio.Event()

    async def take(self, num_bytes: int) -> None:
        """Count ``num_bytes`` as pinned, once they fit; :meth:`give` ends it."""
        async with self._turn:
            while not self._fits(num_bytes):
                self._given.clear()
                await self._given.wait()
            self.pinned_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        """Count ``num_bytes`` as pinned no more."""
        self.pinned_bytes -= num_bytes
        self._given.set()

    @asynccontextmanager
    async def reserved(self, num_bytes: int) -> AsyncGenerator[None, None]:
        """Count ``num_bytes`` as pinned while the context lasts."""
        await self.take(num_bytes)
        try:
            yield
        finally:
            self.give(num_bytes)

    def _fits(self, num_bytes: int) -> bool:
        if self.max_bytes is None or not self.pinned_bytes:
            return True
        return self.pinned_bytes + num_bytes <= self.max_bytes
