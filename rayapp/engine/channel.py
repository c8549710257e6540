"""The KV channel carries a packed segment from the prefilling process to the decoding one.

The conductor of a request reserves room for its KV, opens a streaming call to a prefill stage, and
owns the message at the end of that call until a decode stage has fetched it::

    async with channel.reserved(num_bytes), aclosing(...) as stream:
        item = await stream.item()
        while item announces a part of the KV:
            handle = await channel.part(stream)
            ...  # in the decode stage: message = await channel.fetch(handle)
            channel.release(handle)
            item = await stream.item()
        async with channel.received(stream) as handle:
            ...  # the last message, or the only one

A channel moves the pieces of messages; :func:`rayapp.kv.wire.unpack` checks their meaning. What a
stream yields for a message is what :meth:`KVChannel.publish` makes of it, so a faster link sends a
descriptor of memory that it has registered, and reads from there into the receiver's pages
(:mod:`rayapp.kv.landing`). The in-process channel is the twin of the one over Ray's object store;
both must pass the same contract test.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rayapp.engine.budget import ByteBudget
from rayapp.errors import TransferError
from rayapp.kv.pieces import Message


class MessageStream(Protocol):
    """A streaming call that prefills: it yields small items, each before a KV message.

    A caller that does not read it to its end must close it.
    """

    async def item(self) -> Any:
        """Return the next small item, or raise the call's exception."""
        ...

    async def message(self) -> Any:
        """Return the message after the latest item while the call goes on; see :meth:`rest`."""
        ...

    async def rest(self) -> Any:
        """Return the last message once the call has ended, in the form that handles store.

        Raises:
            TransferError: The producer died, or its call ended without a message. An exception of
                the call itself is raised unchanged, here or by :meth:`KVChannel.fetch`.
        """
        ...

    async def aclose(self) -> None:
        """Cancel the call in whatever phase it is; a call that has ended is left alone."""
        ...


class KVChannel(Protocol):
    """Moves messages between stages; its handles are opaque, and small enough to travel alone."""

    @property
    def pinned_bytes(self) -> int:
        """Number of bytes for which room is reserved: 0 when idle."""
        ...

    def reserved(self, num_bytes: int) -> AbstractAsyncContextManager[None]:
        """Count ``num_bytes`` as pinned while the context lasts; first come, first served.

        KV exists as soon as a prefill ends, so room for it is taken before one begins. Entering
        waits until the bytes fit; more than the limit travel alone, so nothing waits for ever.
        """
        ...

    async def part(self, stream: Any) -> Any:
        """Own the message that a stream's latest item announced; return its handle.

        The caller ends that with :meth:`release`; the stream goes on.

        Raises:
            TransferError: The stream ended without the message.
        """
        ...

    def release(self, handle: Any) -> None:
        """Give a message up; a second call is harmless."""
        ...

    @staticmethod
    def publish(message: Message) -> Any:
        """Put a message where a receiver gets it; return what the producer's stream yields for it.

        That is the message itself where the stream carries the bytes, or a small descriptor of
        memory that a faster link reads. The pieces of the message stay as they are until then.
        """
        ...

    def received(self, stream: Any) -> AbstractAsyncContextManager[Any]:
        """Own the message at the end of a stream while the context lasts; yield its handle.

        Args:
            stream: A :class:`MessageStream` of this channel all of whose items were read, and for
                which room was reserved before it began.

        Raises:
            TransferError: The stream ended without a message, see :meth:`MessageStream.rest`.
        """
        ...

    @staticmethod
    async def fetch(handle: Any) -> Any:
        """Return the message behind a handle, an :class:`rayapp.kv.pieces.Arrival`.

        Any process may call this, any number of times. A channel whose bytes lie in the memory of
        this process or node returns them, read-only; one that reads registered memory fetches the
        head, and its arrival reads the body into the pages that were taken for it.

        Raises:
            TransferError: The message was released or lost. An exception that the prefill raised
                instead of a message is raised unchanged.
        """
        ...


def without_message() -> TransferError:
    """The error for a call that ended, or whose producer died, before it sent its message."""
    return TransferError("a prefill ended without its KV message; prefill the prompt again")


def after_release() -> TransferError:
    """The error for a message that nobody owns any more."""
    return TransferError("the KV message was released; prefill the prompt again")


@dataclass(eq=False)
class LocalHandle:
    """Handle of a message in this process; the message is None once released."""

    message: Any


class LocalStream:
    """The stream of a prefill in this process.

    Args:
        items: Yields small items, each before a message, to which nobody writes any more.
    """

    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self._items = items

    async def item(self) -> Any:
        """Return the next small item; see :class:`MessageStream`."""
        try:
            return await anext(self._items)
        except StopAsyncIteration:
            raise without_message() from None

    async def message(self) -> Any:
        """Return the message after the latest item; see :class:`MessageStream`."""
        return await self.item()

    async def rest(self) -> Any:
        """Return the last message; see :class:`MessageStream`."""
        message = await self.message()
        await self.aclose()
        return message

    async def aclose(self) -> None:
        """Cancel the prefill; see :class:`MessageStream`."""
        await self._items.aclose()


class LocalChannel:
    """The channel within one process: it copies nothing and only counts bytes.

    Args:
        max_pinned_bytes: Limit of bytes on their way, None for no limit.
    """

    def __init__(self, *, max_pinned_bytes: int | None = None) -> None:
        self._budget = ByteBudget(max_pinned_bytes)

    @property
    def pinned_bytes(self) -> int:
        """Number of bytes for which room is reserved."""
        return self._budget.pinned_bytes

    def reserved(self, num_bytes: int) -> AbstractAsyncContextManager[None]:
        """Count ``num_bytes`` as pinned while the context lasts; see :class:`KVChannel`."""
        return self._budget.reserved(num_bytes)

    @staticmethod
    def publish(message: Message) -> Message:
        """Return the message itself; see :class:`KVChannel`."""
        return message

    @staticmethod
    async def part(stream: LocalStream) -> LocalHandle:
        """Own the message that the latest item announced; see :class:`KVChannel`."""
        return LocalHandle(await stream.message())

    @staticmethod
    def release(handle: LocalHandle) -> None:
        """Give a message up; see :class:`KVChannel`."""
        handle.message = None

    @asynccontextmanager
    async def received(self, stream: LocalStream) -> AsyncGenerator[LocalHandle, None]:
        """Own the message at the end of a stream; see :class:`KVChannel`."""
        handle = LocalHandle(await stream.rest())
        try:
            yield handle
        finally:
            self.release(handle)

    @staticmethod
    async def fetch(handle: LocalHandle) -> Any:
        """Return the message; see :class:`KVChannel`."""
        if handle.message is None:
            raise after_release()
        return handle.message
