"""A thread that runs calls one after the other: whoever owns an engine or packs KV is one.

Engines are not thread-safe and torch computes for long, so each replica runs everything that
touches an engine on one thread, in the order submitted, while its event loop stays live for
cancellations, health checks and metrics. What needs no engine (packing, checking and decoding KV)
runs beside it on a second thread, so that nobody's KV waits for somebody else's step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from rayapp.errors import UnavailableError

Result = TypeVar("Result")


class SerialThread:
    """Runs calls one at a time in the order submitted; a call can be cancelled until it begins.

    Args:
        name: The thread's name, for stack dumps and profilers.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._began_s: float | None = None
        self._executor = ThreadPoolExecutor(
            1,
            thread_name_prefix=name,
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )

    def submit(self, call: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result]:
        """Queue a call at once, without waiting for it."""
        return asyncio.wrap_future(self._executor.submit(self._timed, call, *arguments))

    def _timed(self, call: Callable[..., Result], *arguments: Any) -> Result:
        self._began_s = time.monotonic()
        try:
            return call(*arguments)
        finally:
            self._began_s = None

    def check_alive(self, limit_s: float) -> None:
        """Raise :class:`UnavailableError` if the running call has taken longer than ``limit_s``.

        Nothing can end a call that hangs in a kernel; who asks this ends the process.
        """
        began_s = self._began_s
        seconds = 0.0 if began_s is None else time.monotonic() - began_s
        if seconds > limit_s:
            raise UnavailableError(
                f"the {self._name} thread is in one call for {seconds:.1f} s, and {limit_s:.1f} s "
                "are allowed; the replica is replaced: where calls take longer, raise "
                "deadlines.step_s"
            )

    async def run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Return the call's result; cancelling this cancels a call that has not begun.

        A call that has begun ends by itself, and its result is dropped.
        """
        return await self.submit(call, *arguments)

    async def finish(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Return the call's result as :meth:`run` does, but wait for it even when cancelled."""
        running = self.submit(call, *arguments)
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError as error:
                cancelled = error
            except Exception:  # noqa: BLE001 - raised to the waiter below
                break
        if cancelled is not None:
            running.exception()
            raise cancelled
        return running.result()
