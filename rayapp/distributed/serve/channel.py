"""KV through Ray's object store, owned by whoever receives the call's answer.

Three measured facts rule this module. An object that a replica *puts* dies with the replica; one
that it *returns* belongs to the caller and survives it. Awaiting the next reference of a stream
that is still running also fetches its value, so the reference is taken only once the stream has
ended, when nothing needs to be awaited. And a reference that is passed to a streaming call stays
pinned until that stream ends, so messages are handed over in unary calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
from ray.exceptions import RayError

from rayapp.engine.channel import ByteBudget, check_message
from rayapp.errors import OverloadedError, TransferError


@dataclass(eq=False)
class ObjectHandle:
    """A message by reference, None once released. Boxed, it travels without the data."""

    reference: ray.ObjectRef | None
    num_bytes: int


class ReplicaStream:
    """The items of one streaming call to a replica, by reference.

    Args:
        response: Serve's response generator.
    """

    def __init__(self, response: Any) -> None:
        self._response = response
        self._references: Any = None

    async def first(self) -> Any:
        """The first item's value, which is small."""
        # The one use of Serve's private way from a response to references; tests hold it.
        self._references = await self._response._to_object_ref_gen()
        return await (await anext(self._references))

    async def rest(self) -> ray.ObjectRef:
        """The second item's reference, once the call has ended; its value is not fetched."""
        await self._references.completed()
        return await anext(self._references)

    def cancel(self) -> None:
        """Stop the call, wherever it is."""
        self._response.cancel()


class ObjectStoreChannel:
    """The channel between nodes; the twin of :class:`rayapp.engine.channel.LocalChannel`.

    Args:
        max_pinned_bytes: Most bytes under way, None for no limit. The object store itself only
            slows down when it is full.
    """

    def __init__(self, *, max_pinned_bytes: int | None = None) -> None:
        self._budget = ByteBudget(max_pinned_bytes)
        self._held: set[ObjectHandle] = set()
        self._given = asyncio.Event()

    @property
    def pinned_bytes(self) -> int:
        """Bytes sent and not yet released."""
        return self._budget.pinned_bytes

    async def send(self, message: np.ndarray) -> ObjectHandle:
        """Put a message of this process into the store; see :class:`KVChannel`."""
        check_message(message)
        self._budget.take(message.nbytes)
        handle = ObjectHandle(ray.put(message), message.nbytes)
        self._held.add(handle)
        return handle

    @asynccontextmanager
    async def reserved(self, num_bytes: int) -> AsyncGenerator[None, None]:
        """Count ``num_bytes`` as pinned while the context lasts; waits until they fit.

        KV is in the store as soon as a prefill ends, so room for it is taken before one begins.

        Raises:
            OverloadedError: They never fit.
        """
        limit = self._budget.max_bytes
        if limit is not None and num_bytes > limit:
            raise OverloadedError(
                f"this prompt's KV may weigh {num_bytes} bytes, and at most {limit} may be under "
                "way; shorten the prompt or raise max_kv_bytes"
            )
        while limit is not None and self.pinned_bytes + num_bytes > limit:
            self._given.clear()
            await self._given.wait()
        self._budget.take(num_bytes)
        try:
            yield
        finally:
            self._give(num_bytes)

    @asynccontextmanager
    async def received(
        self, stream: ReplicaStream, num_bytes: int
    ) -> AsyncGenerator[ObjectHandle, None]:
        """Own the message at the end of a replica's stream while the context lasts.

        Args:
            stream: Its first item was read, and room was reserved before it began.
            num_bytes: What the message weighs, about.
        """
        handle = ObjectHandle(await stream.rest(), num_bytes)
        try:
            yield handle
        finally:
            handle.reference = None

    async def fetch(self, handle: ObjectHandle) -> np.ndarray:
        """The message, read-only; see :class:`KVChannel`."""
        return await fetch(handle)

    async def release(self, handle: ObjectHandle) -> None:
        """Let the message go; see :class:`KVChannel`. The object ends with the last handle."""
        if handle in self._held:
            self._held.discard(handle)
            self._give(handle.num_bytes)
            handle.reference = None

    def _give(self, num_bytes: int) -> None:
        self._budget.give(num_bytes)
        self._given.set()


async def fetch(handle: ObjectHandle) -> np.ndarray:
    """The message behind a handle, zero-copy and read-only, in whichever process asks.

    Raises:
        TransferError: The message was released or lost.
    """
    if handle.reference is None:
        raise TransferError("the KV message was released; prefill the prompt again")
    try:
        return cast("np.ndarray", await handle.reference)
    except RayError as error:
        raise TransferError(
            f"a KV message of {handle.num_bytes} bytes is lost ({type(error).__name__}); "
            "prefill the prompt again"
        ) from None
