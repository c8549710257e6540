"""One prefill behind the calls that an ingress makes, in this process or in an actor of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np

from rayapp.engine.channel import KVChannel, LocalChannel, LocalStream
from rayapp.errors import DeadlineError
from rayapp.kv.pieces import Message

BUDGET = 1000
INLINE, STORED = 100, 300_000  # bytes; Ray sends small values inside its own messages


def message(length: int = INLINE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.uint8)


def sent(length: int, seed: int) -> Message:
    """The same bytes in two pieces."""
    return Message(tuple(np.array_split(message(length, seed), 2)))


class Prefill:
    """A prefill as a channel sees it. ``waits`` and ``fails`` name the item before which it does.

    It fails by an exception; with ``fails="silently"`` it ends before its message.
    """

    def __init__(self, publish: Any = LocalChannel.publish) -> None:
        self._publish = publish
        self._active = 0
        self._gate = asyncio.Event()
        self._dead = False

    async def renew(self) -> None:
        """Become as good as new, for another test in the same process."""
        assert not self._active
        self._gate.clear()

    async def items(
        self,
        seed: int = 0,
        length: int = INLINE,
        waits: str = "",
        fails: str = "",
        num_parts: int = 0,
    ) -> AsyncGenerator[Any, None]:
        self._active += 1
        parts = [
            (f"{kind} {part}", item)
            for part in range(num_parts)
            for kind, item in (("notice", "part"), ("part", sent(length, seed + part)))
        ]
        try:
            last = ("first", "small"), ("message", sent(length, seed + num_parts))
            for name, item in (*parts, *last):
                if waits == name:
                    await self._gate.wait()
                if fails == name:
                    raise DeadlineError(f"no {name} today")
                if self._dead or (fails == "silently" and name == "message"):
                    return
                yield self._publish(item) if isinstance(item, Message) else item
        finally:
            self._active -= 1

    async def num_active(self) -> int:
        return self._active

    async def go_on(self) -> None:
        self._gate.set()

    async def die(self) -> None:
        """Send nothing any more, which is how a dead process looks to its caller."""
        self._dead = True
        self._gate.set()


class InProcess:
    """The twin within one process, by hand or over registered buffers."""

    def __init__(self, kind: Any = LocalChannel) -> None:
        self.channel: KVChannel = kind(max_pinned_bytes=BUDGET)
        self._prefill = Prefill(kind.publish)
        self.num_active = self._prefill.num_active
        self.go_on = self._prefill.go_on
        self.die = self._prefill.die

    def call(self, *arguments: Any, **options: Any) -> LocalStream:
        return LocalStream(self._prefill.items(*arguments, **options))


class ActorResponse:
    """A streaming call of an actor, with those of Serve's methods that a stream uses."""

    def __init__(self, references: Any) -> None:
        self._references = references

    async def _to_object_ref_gen(self) -> Any:
        return self._references

    def cancel(self) -> None:
        import ray

        ray.cancel(self._references)


class OverTheStore:
    """The channel over Ray, with a prefill in a process of its own."""

    def __init__(self, actor: Any) -> None:
        from rayapp.distributed.serve.channel import ObjectStoreChannel

        self.channel: KVChannel = ObjectStoreChannel(max_pinned_bytes=BUDGET)
        self._actor = actor

    def call(self, *arguments: Any, **options: Any) -> Any:
        from rayapp.distributed.serve.channel import ReplicaStream

        call = self._actor.items.options(num_returns="streaming")
        return ReplicaStream(ActorResponse(call.remote(*arguments, **options)))

    async def num_active(self) -> int:
        return await self._actor.num_active.remote()

    async def go_on(self) -> None:
        await self._actor.go_on.remote()

    async def die(self) -> None:
        import ray

        ray.kill(self._actor)
