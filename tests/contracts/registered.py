"""A stand-in for links that read registered memory, such as NIXL's: buffers in shared memory.

The producer registers one buffer per message and sends its descriptor, with the message's head in
it. Whoever has the descriptor reads the buffer into places of its own, from any process of this
machine, and the owner gives it up.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import numpy as np

from rayapp.engine.budget import ByteBudget
from rayapp.engine.channel import LocalStream, after_release
from rayapp.kv.pieces import Bytes, Message


@dataclass(frozen=True)
class Descriptor:
    """Where a message is, how many bytes it has, and its first piece."""

    name: str
    nbytes: int
    head: bytes


@dataclass(eq=False)
class RegisteredHandle:
    """The descriptor, None once released."""

    descriptor: Descriptor | None


@dataclass(frozen=True)
class RegisteredArrival:
    """A message whose head is here, and whose body is read from registered memory."""

    handle: RegisteredHandle

    @property
    def nbytes(self) -> int:
        return self._descriptor.nbytes

    @property
    def head(self) -> Bytes:
        return np.frombuffer(self._descriptor.head, np.uint8)

    def read(self, begin: int, places: Iterable[Bytes], note: Callable[[Bytes], object]) -> None:
        """Read all places in one go, as a link with one list of descriptors does."""
        try:
            buffer = shared_memory.SharedMemory(self._descriptor.name)
        except FileNotFoundError:
            raise after_release() from None
        _forget(buffer)
        places = list(places)
        for place in places:
            place[:] = np.frombuffer(buffer.buf, np.uint8, len(place), begin)
            begin += len(place)
        buffer.close()
        for place in places:
            note(place)

    @property
    def _descriptor(self) -> Descriptor:
        if self.handle.descriptor is None:
            raise after_release()
        return self.handle.descriptor


class RegisteredChannel:
    """The channel over registered buffers."""

    def __init__(self, *, max_pinned_bytes: int | None = None) -> None:
        self._budget = ByteBudget(max_pinned_bytes)

    @staticmethod
    def publish(message: Message) -> Descriptor:
        buffer = shared_memory.SharedMemory(create=True, size=max(1, message.nbytes))
        begin = 0
        for piece in message.pieces:
            buffer.buf[begin : begin + piece.nbytes] = piece.data
            begin += piece.nbytes
        _forget(buffer)  # It is the receiver's from here on.
        buffer.close()
        _PUBLISHED.add(buffer.name)
        return Descriptor(buffer.name, message.nbytes, message.head.tobytes())

    @staticmethod
    def close() -> None:
        """Give up buffers that nobody received, as a producer does when it ends."""
        for name in tuple(_PUBLISHED):
            _unlink(name)

    @property
    def pinned_bytes(self) -> int:
        return self._budget.pinned_bytes

    def reserved(self, num_bytes: int) -> AbstractAsyncContextManager[None]:
        return self._budget.reserved(num_bytes)

    @staticmethod
    async def part(stream: LocalStream) -> RegisteredHandle:
        return RegisteredHandle(await stream.message())

    @staticmethod
    def release(handle: RegisteredHandle) -> None:
        if handle.descriptor is not None:
            _unlink(handle.descriptor.name)
        handle.descriptor = None

    @asynccontextmanager
    async def received(self, stream: LocalStream) -> AsyncGenerator[RegisteredHandle, None]:
        handle = RegisteredHandle(await stream.rest())
        try:
            yield handle
        finally:
            self.release(handle)

    @staticmethod
    async def fetch(handle: RegisteredHandle) -> RegisteredArrival:
        if handle.descriptor is None:
            raise after_release()
        return RegisteredArrival(handle)


_PUBLISHED: set[str] = set()


def _unlink(name: str) -> None:
    _PUBLISHED.discard(name)
    buffer = shared_memory.SharedMemory(name)
    buffer.unlink()
    buffer.close()


def _forget(buffer: Any) -> None:
    """Python unlinks what a process has opened when that ends; the owner does so here."""
    resource_tracker.unregister(buffer._name, "shared_memory")
