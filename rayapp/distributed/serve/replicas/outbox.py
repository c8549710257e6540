"""Tokens on their way from a decode replica to its ingresses: one item per step and ingress.

A streaming call costs CPU for every item, whatever it holds: 0.6 ms where 64 streams have one each
(`benchmarks/delivery.py`). So the answers of one ingress share one call, and an item carries what
all of them have gained since the item before it: that of one step, or of several where the ingress
is slow to read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

from rayapp.distributed.serve.messages import Reader, TokenRow, row_of
from rayapp.engine.request import TokenBatch, merged_by_answer

LINGER_S = 1.0
"""How long a call without answers stays open for the next one (project default)."""
MAX_ITEMS = 10_000
"""Items after which a call ends and is made anew, so that none grows for ever (project default)."""


class Source(Protocol):
    """The tokens of some answers, which wait here until an item takes them."""

    def take_unread(self) -> list[TokenBatch]:
        """Return all tokens since the last call, and count them as read."""
        ...


class Outbox:
    """The tokens for one ingress, and the answers that it reads.

    A source that leaves takes its unread tokens with it: its answers are not wanted any more.
    """

    def __init__(self) -> None:
        self.sources: set[Source] = set()
        self._unread: dict[Source, None] = {}
        self._news = asyncio.Event()
        self._call: object | None = None

    @property
    def is_needed(self) -> bool:
        """True if somebody reads it, or may have to."""
        return bool(self.sources) or self._call is not None

    def add(self, source: Source) -> None:
        """Count a source in, whose tokens come later."""
        self.sources.add(source)

    def remove(self, source: Source) -> None:
        """Count a source out; a second call is harmless."""
        self.sources.discard(source)
        self._unread.pop(source, None)
        self._news.set()

    def put(self, source: Source) -> None:
        """Note that a source has unread tokens."""
        self._unread[source] = None
        self._news.set()

    async def items(self) -> AsyncGenerator[list[TokenRow], None]:
        """Generate items until no source has been here for a while, or another call has come.

        What is unread when a call ends stays for the next one.
        """
        call = self._call = object()
        self._news.set()  # A call before this one ends.
        try:
            for _ in range(MAX_ITEMS):
                if not await self._any_unread(call):
                    return
                yield self._take()
        finally:
            if self._call is call:
                self._call = None

    async def _any_unread(self, call: object) -> bool:
        """Wait for unread tokens; False if the call is to end without any."""
        while self._call is call:
            if self._unread:
                return True
            self._news.clear()
            try:
                async with asyncio.timeout(None if self.sources else LINGER_S):
                    await self._news.wait()
            except TimeoutError:
                return False
        return False

    def _take(self) -> list[TokenRow]:
        sources, self._unread = self._unread, {}
        return [
            row_of(batch) for source in sources for batch in merged_by_answer(source.take_unread())
        ]


class Outboxes:
    """The outboxes of one replica, by the name of their reader."""

    def __init__(self) -> None:
        self._outboxes: dict[str, Outbox] = {}

    def of(self, reader: Reader) -> Outbox:
        """Return the outbox of a reader, a new one if it has none."""
        self._outboxes = {name: box for name, box in self._outboxes.items() if box.is_needed}
        return self._outboxes.setdefault(reader.name, Outbox())
