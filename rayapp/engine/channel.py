"""The KV channel: how a packed segment gets from the process that prefilled to that which decodes.

A channel moves opaque bytes; what they mean is checked by :func:`rayapp.kv.wire.unpack`. It counts
the bytes that it keeps alive and refuses beyond its budget. The in-process channel is the twin of
the one over Ray's object store; one contract test holds both.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rayapp.errors import OverloadedError, TransferError


class KVChannel(Protocol):
    """Moves messages between stages. A handle is opaque, and small enough to travel by itself."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes sent and not yet released: 0 when idle."""
        ...

    async def send(self, message: np.ndarray) -> Any:
        """Take over a 1-D uint8 message, to which nobody writes any more; returns its handle.

        Raises:
            OverloadedError: The byte budget is used up.
            TransferError: Not a 1-D uint8 array.
        """
        ...

    async def fetch(self, handle: Any) -> np.ndarray:
        """The message, read-only, as often as needed until it is released.

        Raises:
            TransferError: The message was released or lost.
        """
        ...

    async def release(self, handle: Any) -> None:
        """Let the message go; harmless where that has already happened."""
        ...


def check_message(message: np.ndarray) -> None:
    """Raise :class:`TransferError` where ``message`` is not a 1-D uint8 array."""
    if message.dtype != np.uint8 or message.ndim != 1:
        raise TransferError(
            f"a KV message is a 1-D uint8 array, got {message.ndim}-D {message.dtype}; "
            "pack the segment first"
        )


class ByteBudget:
    """Counts pinned bytes against a limit; every channel uses it for its accounting.

    Args:
        max_bytes: Limit, None for none.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.pinned_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count ``num_bytes`` as pinned; raises :class:`OverloadedError` beyond the limit."""
        if self.max_bytes is not None and self.pinned_bytes + num_bytes > self.max_bytes:
            raise OverloadedError(
                f"{self.pinned_bytes} bytes of KV are under way and {num_bytes} more would pass "
                f"the limit of {self.max_bytes}; try again later"
            )
        self.pinned_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        """Count ``num_bytes`` as freed."""
        self.pinned_bytes -= num_bytes


@dataclass(frozen=True)
class LocalHandle:
    """Names a message of a :class:`LocalChannel`."""

    number: int


class LocalChannel:
    """The channel within one process: no copy, only accounting.

    Args:
        max_pinned_bytes: Most bytes under way, None for no limit.
    """

    def __init__(self, *, max_pinned_bytes: int | None = None) -> None:
        self._budget = ByteBudget(max_pinned_bytes)
        self._messages: dict[LocalHandle, np.ndarray] = {}
        self._numbers = itertools.count()

    @property
    def pinned_bytes(self) -> int:
        """Bytes sent and not yet released."""
        return self._budget.pinned_bytes

    async def send(self, message: np.ndarray) -> LocalHandle:
        """Take over a message; see :class:`KVChannel`."""
        check_message(message)
        self._budget.take(message.nbytes)
        handle = LocalHandle(next(self._numbers))
        view = message.view()
        view.flags.writeable = False
        self._messages[handle] = view
        return handle

    async def fetch(self, handle: LocalHandle) -> np.ndarray:
        """The message, read-only; see :class:`KVChannel`."""
        if handle not in self._messages:
            raise TransferError(f"KV message {handle.number} is gone; prefill the prompt again")
        return self._messages[handle]

    async def release(self, handle: LocalHandle) -> None:
        """Let the message go; see :class:`KVChannel`."""
        message = self._messages.pop(handle, None)
        if message is not None:
            self._budget.give(message.nbytes)
