"""Phases of an attempt: every wait for a replica has the deadline of its phase."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from rayapp.errors import DeadlineError, UnavailableError

UPDATE_PAUSE_S = 0.2
"""Pause before another replica is asked, where one of another version refused."""


async def next_item(response: Any, name: str, within_s: float) -> Any:
    """Return the next item of a streaming response, within the phase's deadline."""
    async with phase(name, within_s):
        return await item_of(response, name)


async def end_of(response: Any) -> None:
    """Return once a streaming response that brings nothing more has ended; raise its error."""
    async for _ in response:
        pass


async def item_of(response: Any, name: str) -> Any:
    """Return the next item of a streaming response; the caller's phase bounds the wait."""
    try:
        return await anext(response)
    except StopAsyncIteration:
        raise UnavailableError(f"the {name} stream ended too early; prefill again") from None


@asynccontextmanager
async def phase(name: str, within_s: float) -> AsyncGenerator[None, None]:
    """Raise :class:`DeadlineError` if the body does not end within ``within_s``."""
    try:
        async with asyncio.timeout(within_s):
            yield
    except TimeoutError:
        raise deadline_error(name, within_s) from None


def deadline_error(name: str, limit_s: float) -> DeadlineError:
    """The error of a phase that did not end within ``limit_s``."""
    return DeadlineError(
        f"{name} did not end within {limit_s:.1f} s; what it held was freed: "
        "try again later or raise its deadline"
    )
