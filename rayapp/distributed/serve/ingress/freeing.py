"""The word to replicas that an attempt has ended here, so that they free what it holds there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import Context
from typing import Any

from rayapp.distributed.serve.ingress.calls import ask_all, call
from rayapp.distributed.serve.ingress.losses import DIED
from rayapp.distributed.serve.messages import Address, Place
from rayapp.engine.request import PromptRequests

# Longest wait of a client's end for a replica to free a slot; the call itself goes on after it.
_FREEING_S = 1.0


class Freeing:
    """Tells the replicas of one pool that nobody reads an attempt's answers.

    Cancelling a call is not enough: if it never reached its replica, the replica would not know.
    Nor is a call made within the request: where the client has left, Serve cancels the request's
    Ray task, and Ray all calls that this task has made, so also the one that should free its slots.
    A task with an empty context belongs to no Ray task.

    Args:
        pool: Serve's handle of the pool.
        within_s: Seconds after which a replica frees by itself what nobody reads.
    """

    def __init__(self, pool: Any, *, within_s: float) -> None:
        self._pool = pool
        self._within_s = within_s
        self._running: set[asyncio.Future[None]] = set()

    async def free(self, prompt: PromptRequests, place: Place) -> None:
        """Tell the replica that works on the attempt."""
        await self.to_the_end(self._free(prompt, place))

    async def withdraw(self, prompt: PromptRequests, response: Any = None) -> None:
        """Cancel a call, if one is given, and tell all replicas: who has it is not known."""
        await self.to_the_end(self._withdraw(prompt, response))

    async def _free(self, prompt: PromptRequests, place: Place) -> None:
        response = call(self._pool.cancel, *prompt.key, address=Address(place.replica_id))
        with suppress(*DIED, TimeoutError):
            async with asyncio.timeout(self._within_s):
                await response

    async def _withdraw(self, prompt: PromptRequests, response: Any) -> None:
        if response is not None:
            with suppress(*DIED):
                response.cancel()
        await ask_all(self._pool, "cancel", *prompt.key, within_s=self._within_s)

    async def to_the_end(self, freeing: Coroutine[Any, Any, None]) -> None:
        """Finish freeing resources, even if the caller is cancelled once more in the meantime.

        Args:
            freeing: What frees them; it goes on in a task of its own.

        A client that leaves may cause two cancellations: one by our own watch, and one by Serve.
        A replica on a busy node may answer late: the caller waits for a moment only, and the call
        goes on until the replica would free the slot by itself.
        """
        task = asyncio.get_running_loop().create_task(freeing, context=Context())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        done, _ = await asyncio.wait({task}, timeout=_FREEING_S)
        for freed in done:
            freed.result()
