"""A client that leaves cancels the work done for it, whether its answer is streamed or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rayapp.errors import CancelledRequestError

Result = TypeVar("Result")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of ``work``, or cancel ``work`` as soon as the client has left.

    Only one task may listen at a time, because ASGI hands out every message once.

    Args:
        receive: The ASGI channel, after the body was read.
        work: The coroutine that computes the client's answer.

    Raises:
        CancelledRequestError: The client left; ``work`` has ended and freed its resources.
    """
    running, left = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({running, left}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise CancelledRequestError("the client left before its answer was complete")
    finally:
        running.cancel()
        left.cancel()
        await asyncio.gather(running, left, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that streams server-sent events.

    Args:
        events: Encoded events.
        source: The generator behind ``events``; closed when they end or the client leaves. (Closing
            ``events`` alone would not do: a generator that never began does not run its end.)
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events; return silently if the client has left."""
        with suppress(CancelledRequestError, OSError):
            async with aclosing(self._source):
                await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        async with aclosing(self._events):
            await send({"type": "http.response.start", **start})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
