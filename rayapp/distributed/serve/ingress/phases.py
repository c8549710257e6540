"""Phases of an attempt: every wait for a replica has the deadline of its phase."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.errors import DeadlineError, UnavailableError

UPDATE_PAUSE_S = 0.2
"""Pause before another replica is asked, where one of another version refused."""


async def streamed(
    response: Any, requests: Sequence[GenerationRequest], limit_s: float
) -> AsyncGenerator[TokenBatch, None]:
    """Generate the token batches of a response until every request has its final one.

    Leaving early cancels the response.
    """
    until_s = time.monotonic() + limit_s
    unfinished = {request.request_id for request in requests}
    try:
        while unfinished:
            for batch in await next_item(response, "decode", until_s - time.monotonic(), limit_s):
                if batch.finish_reason is not None:
                    unfinished.discard(batch.request_id)
                yield batch
    finally:
        if unfinished:
            response.cancel()


async def next_item(response: Any, name: str, within_s: float, limit_s: float | None = None) -> Any:
    """Return the next item of a streaming response, within the phase's deadline."""
    async with phase(name, within_s, limit_s):
        return await item_of(response, name)


async def item_of(response: Any, name: str) -> Any:
    """Return the next item of a streaming response; the caller's phase bounds the wait."""
    try:
        return await anext(response)
    except StopAsyncIteration:
        raise UnavailableError(f"the {name} stream ended too early; prefill again") from None


@asynccontextmanager
async def phase(
    name: str, within_s: float, limit_s: float | None = None
) -> AsyncGenerator[None, None]:
    """Raise :class:`DeadlineError` if the body does not end within ``within_s``."""
    try:
        async with asyncio.timeout(within_s):
            yield
    except TimeoutError:
        raise DeadlineError(
            f"{name} did not end within {limit_s or within_s:.1f} s; what it held was freed: "
            "try again later or raise its deadline"
        ) from None
