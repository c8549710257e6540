"""The KV channel over Ray's object store; the receiver of a call's answer owns the message.

Three measured facts rule this module. An object that a replica *puts* dies with the replica; one
that it *returns* belongs to the caller and survives it, once the call has ended. Awaiting the next
reference of a stream that is still running also fetches its value, so the reference of a message is
taken only once it is ready, when nothing needs to be awaited. And a reference that is passed to a
streaming call stays pinned until that stream ends, so messages are handed over in unary calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rayapp.engine.budget import ByteBudget
from rayapp.engine.channel import after_release, without_message
from rayapp.errors import TransferError
from rayapp.kv.pieces import Message

_LOOK_S = 0.001


@dataclass(eq=False)
class ObjectHandle:
    """Handle of a message by reference, None once released; it travels without the data."""

    reference: ray.ObjectRef | None


class ReplicaStream:
    """The stream of one call to a replica, which gives the message by reference.

    Args:
        response: Serve's response generator.
    """

    def __init__(self, response: Any) -> None:
        self._response = response
        self._references: Any = None

    async def item(self) -> Any:
        """Return the value of the next item, which is small."""
        if self._references is None:
            # This is the only use of Serve's private way from a response to references; tests guard
            # it.
            self._references = await self._response._to_object_ref_gen()
        try:
            return await (await anext(self._references))
        except StopAsyncIteration:
            raise without_message() from None

    async def message(self) -> ray.ObjectRef:
        """Return the reference of the next item, which follows at once, without fetching its value.

        Awaiting the reference would fetch the value, so this looks for it now and then.
        """
        while not self._references.next_ready():
            if self._references.is_finished():
                raise without_message()
            await asyncio.sleep(_LOOK_S)
        try:
            return next(self._references)
        except (StopIteration, RayError):
            raise without_message() from None

    async def rest(self) -> ray.ObjectRef:
        """Return the last item's reference once the call has ended, without fetching its value.

        An exception that the call raises instead of its last item is that item's value.
        """
        try:
            await self._references.completed()
            return await anext(self._references)
        except (StopAsyncIteration, RayError):
            raise without_message() from None

    async def aclose(self) -> None:
        """Cancel the call, in whatever phase it is."""
        self._response.cancel()


class ObjectStoreChannel:
    """The channel between nodes; the twin of :class:`rayapp.engine.channel.LocalChannel`.

    Args:
        max_pinned_bytes: Limit of bytes on their way, None for no limit. The object store itself
            only slows down when it is full.
    """

    def __init__(self, *, max_pinned_bytes: int | None = None) -> None:
        self._budget = ByteBudget(max_pinned_bytes)

    @property
    def pinned_bytes(self) -> int:
        """Number of bytes for which room is reserved."""
        return self._budget.pinned_bytes

    def reserved(self, num_bytes: int) -> AbstractAsyncContextManager[None]:
        """Count ``num_bytes`` as pinned while the context lasts."""
        return self._budget.reserved(num_bytes)

    @staticmethod
    def publish(message: Message) -> Message:
        """Return the message itself: Serve stores what a replica's stream yields."""
        return message

    @staticmethod
    async def part(stream: ReplicaStream) -> ObjectHandle:
        """Own the message that the stream's latest item announced, until it is released."""
        return ObjectHandle(await stream.message())

    @staticmethod
    def release(handle: ObjectHandle) -> None:
        """Give a message up."""
        handle.reference = None

    @asynccontextmanager
    async def received(self, stream: ReplicaStream) -> AsyncGenerator[ObjectHandle, None]:
        """Own the message at the end of a replica's stream while the context lasts."""
        handle = ObjectHandle(await stream.rest())
        try:
            yield handle
        finally:
            self.release(handle)

    @staticmethod
    async def fetch(handle: ObjectHandle) -> Any:
        """Return the message behind a handle, zero-copy and read-only, in any process."""
        if handle.reference is None:
            raise after_release()
        try:
            return await handle.reference
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise TransferError(
                f"a KV message is lost ({type(error).__name__}); prefill the prompt again"
            ) from None
