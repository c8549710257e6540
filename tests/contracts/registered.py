"""A stand-in for links that read registered memory, such as NIXL's: buffers in shared memory.

The producer registers one buffer per message and sends its descriptor; whoever has the descriptor
reads the buffer, from any process of this machine, and the owner gives it up.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import numpy as np

from rayapp.engine.budget import ByteBudget
from rayapp.engine.channel import LocalStream, after_release
from rayapp.kv.pieces import Message


@dataclass(frozen=True)
class Descriptor:
    """Where a message is, and how many bytes its pieces have."""

    name: str
    sizes: tuple[int, ...]


@dataclass(eq=False)
class RegisteredHandle:
    """The descriptor, None once released."""

    descriptor: Descriptor | None


class RegisteredChannel:
    """The channel over registered buffers."""

    def __init__(self, *, max_pinned_bytes: int | None = None) -> None:
        self._budget = ByteBudget(max_pinned_bytes)

    @staticmethod
    def publish(message: Message) -> Descriptor:
        sizes = tuple(piece.nbytes for piece in message.pieces)
        buffer = shared_memory.SharedMemory(create=True, size=max(1, sum(sizes)))
        begin = 0
        for piece, size in zip(message.pieces, sizes, strict=True):
            buffer.buf[begin : begin + size] = piece.data
            begin += size
        _forget(buffer)  # It is the receiver's from here on.
        buffer.close()
        _PUBLISHED.add(buffer.name)
        return Descriptor(buffer.name, sizes)

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
    async def fetch(handle: RegisteredHandle) -> Message:
        if handle.descriptor is None:
            raise after_release()
        buffer = shared_memory.SharedMemory(handle.descriptor.name)
        _forget(buffer)
        pieces, begin = [], 0
        for size in handle.descriptor.sizes:
            pieces.append(np.frombuffer(buffer.buf, np.uint8, size, begin))
            begin += size
        message = Message(tuple(pieces))
        _MAPPED.append(buffer)  # The views need its mapping, which nothing else keeps.
        return message


_MAPPED: list[Any] = []
_PUBLISHED: set[str] = set()


def _unlink(name: str) -> None:
    _PUBLISHED.discard(name)
    buffer = shared_memory.SharedMemory(name)
    buffer.unlink()
    buffer.close()


def _forget(buffer: shared_memory.SharedMemory) -> None:
    """Python unlinks what a process has opened when that ends; the owner does so here."""
    resource_tracker.unregister(buffer._name, "shared_memory")
