"""The contract of every KV channel on reservations: callers wait for room, in their order."""

from __future__ import annotations

import asyncio

import pytest

from rayapp.engine.channel import KVChannel, LocalChannel

BUDGET = 1000


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 60))


class Room:
    """Callers of ``reserved``, each of whom stays until it is sent away."""

    def __init__(self, channel: KVChannel) -> None:
        self._channel = channel
        self._ends: dict[str, asyncio.Event] = {}
        self.inside: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def enter(self, name: str, num_bytes: int) -> None:
        """Begin to ask for room; returns when the caller waits or is inside."""
        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.ensure_future(self._stay(name, num_bytes))
        await self.settled()

    async def _stay(self, name: str, num_bytes: int) -> None:
        async with self._channel.reserved(num_bytes):
            self.inside.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.inside.remove(name)

    async def leave(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await self.settled()

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.gather(self.tasks[name], return_exceptions=True)
        await self.settled()

    async def settled(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture(params=["local", "object_store"])
def channel(request: pytest.FixtureRequest) -> KVChannel:
    """A channel whose messages nobody needs here, so no cluster either."""
    if request.param == "local":
        return LocalChannel(max_pinned_bytes=BUDGET)
    from rayapp.distributed.serve.channel import ObjectStoreChannel

    return ObjectStoreChannel(max_pinned_bytes=BUDGET)


def test_idle_means_zero_pinned_bytes(channel):
    async def scenario():
        room, seen = Room(channel), [channel.pinned_bytes]
        for step in (room.enter("a", 100), room.enter("b", 300), room.leave("a"), room.leave("b")):
            await step
            seen.append(channel.pinned_bytes)
        return seen

    assert run(scenario()) == [0, 100, 400, 300, 0]


def test_more_than_the_limit_travels_alone(channel):
    async def scenario():
        room = Room(channel)
        await room.enter("holder", 1)
        await room.enter("huge", 3 * BUDGET)
        await room.enter("small", 1)  # it would fit, but has come later
        assert room.inside == ["holder"]
        await room.leave("holder")
        assert room.inside == ["huge"]
        assert channel.pinned_bytes == 3 * BUDGET
        await room.leave("huge")
        assert room.inside == ["small"]
        await room.leave("small")

    run(scenario())
    assert channel.pinned_bytes == 0


def test_those_who_wait_for_room_are_served_in_the_order_of_their_arrival(channel):
    async def scenario():
        room = Room(channel)
        await room.enter("holder", 700)
        await room.enter("large", 900)
        await room.enter("small", 100)  # it would fit, but has come later
        assert room.inside == ["holder"]
        await room.leave("holder")
        assert room.inside == ["large", "small"]
        assert channel.pinned_bytes == BUDGET
        await room.enter("next", 200)
        await room.leave("small")
        assert room.inside == ["large"]
        await room.leave("large")
        assert room.inside == ["next"]
        await room.leave("next")

    run(scenario())
    assert channel.pinned_bytes == 0


def test_one_who_stops_waiting_for_room_holds_nobody_up(channel):
    async def scenario():
        room = Room(channel)
        await room.enter("holder", 700)
        await room.enter("large", 900)
        await room.enter("small", 100)
        await room.cancel("large")
        assert room.inside == ["holder", "small"]
        await room.enter("first", 500)
        await room.enter("second", 500)
        await room.cancel("second")
        await room.cancel("holder")
        assert room.inside == ["small", "first"]
        assert channel.pinned_bytes == 600
        await room.leave("first")
        await room.leave("small")

    run(scenario())
    assert channel.pinned_bytes == 0


def test_room_comes_back_where_its_holder_fails(channel):
    async def scenario():
        room = Room(channel)

        async def fail():
            async with channel.reserved(600):
                await room.enter("waiter", 600)
                assert room.inside == []
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        await room.settled()
        assert room.inside == ["waiter"]
        await room.leave("waiter")

    run(scenario())
    assert channel.pinned_bytes == 0
