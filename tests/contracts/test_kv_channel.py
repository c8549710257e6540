"""The contract of every KV channel, over the calls that the ingress and the replicas make.

Both twins run the same prefill: a call of small items, each before a message, which waits or fails
where a test wants it. In process it is a generator; over the object store it runs in an actor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import numpy as np
import pytest

from rayapp.engine.channel import KVChannel, LocalChannel
from rayapp.errors import DeadlineError, TransferError
from rayapp.kv.pieces import Arrival
from tests.contracts.channel_calls import INLINE, STORED, InProcess, OverTheStore, Prefill, message
from tests.contracts.registered import RegisteredChannel


@pytest.fixture(scope="module")
def actor(cluster: Any) -> Any:
    """``actor()`` is a prefill in a process of its own, a new one where the last was killed."""
    import ray

    running: list[Any] = []

    def renewed() -> Any:
        try:
            ray.get([one.renew.remote() for one in running])
        except ray.exceptions.ActorDiedError:
            running.clear()
        if not running:
            running.append(ray.remote(num_cpus=0)(Prefill).remote())
        return running[0]

    return renewed


@pytest.fixture(params=["local", "registered", pytest.param("cluster", marks=pytest.mark.ray)])
def seam(request: pytest.FixtureRequest) -> Any:
    if request.param == "cluster":
        yield OverTheStore(request.getfixturevalue("actor")())
        return
    kinds = {"local": LocalChannel, "registered": RegisteredChannel}
    yield InProcess(kinds[request.param])
    RegisteredChannel.close()


@pytest.fixture
def channel(seam: Any) -> KVChannel:
    return seam.channel


def run(scenario: Any) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, 60))


async def soon(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def idle(seam: Any) -> None:
    """Nothing is pinned, and no call runs any more."""
    assert seam.channel.pinned_bytes == 0

    async def ended() -> bool:
        return await seam.num_active() == 0

    await soon(ended)


def content(arrival: Arrival) -> np.ndarray:
    """All bytes of an arrival, read into places of which none fits its pieces."""
    whole = np.empty(arrival.nbytes, np.uint8)
    noted: list[np.ndarray] = []
    arrival.read(0, np.array_split(whole, 3), lambda copied: noted.append(copied.copy()))
    assert np.array_equal(np.concatenate([*noted, whole[:0]]), whole)
    assert np.array_equal(arrival.head, whole[: arrival.head.nbytes])
    return whole


@asynccontextmanager
async def arriving(seam: Any, *arguments: Any) -> AsyncGenerator[Arrival, None]:
    """What arrives from one call, while its message is owned."""
    stream = seam.call(*arguments)
    await stream.item()
    async with seam.channel.received(stream) as handle:
        yield await seam.channel.fetch(handle)


async def fetched(seam: Any, *arguments: Any, **options: Any) -> np.ndarray:
    """The message that arrives from one call, as the ingress and a decode replica take it over."""
    async with (
        seam.channel.reserved(INLINE),
        aclosing(seam.call(*arguments, **options)) as stream,
    ):
        assert await stream.item() == "small"
        async with seam.channel.received(stream) as handle:
            return content(await seam.channel.fetch(handle))


@pytest.mark.parametrize("length", [0, INLINE, STORED])
def test_a_message_arrives_as_it_was_sent(seam, length):
    async def scenario():
        arrived = await fetched(seam, 1, length)
        await idle(seam)
        return arrived

    assert np.array_equal(run(scenario()), message(length, 1))


@pytest.mark.parametrize("length", [0, INLINE, STORED])
def test_nobody_can_write_to_what_has_arrived(seam, length):
    async def scenario():
        async with arriving(seam, 1, length) as arrival:
            for piece in getattr(arrival, "pieces", (arrival.head,)):
                assert piece.dtype == np.uint8
                with pytest.raises(ValueError, match="read-only"):
                    piece[:] = 1
        await idle(seam)

    run(scenario())


def test_a_message_is_read_into_places_from_any_byte_on(seam):
    async def scenario():
        async with arriving(seam, 7, STORED) as arrival:
            places = [np.empty(n, np.uint8) for n in (0, 1, 200_000, 17)]
            arrival.read(99_900, places, lambda _: None)
        return np.concatenate(places)

    assert np.array_equal(run(scenario()), message(STORED, 7)[99_900 : 99_900 + 200_018])


def test_what_was_released_is_read_no_more(seam):
    """What a descriptor names may be another message's by then; views keep what they show."""

    async def scenario():
        async with arriving(seam, 8, STORED) as arrival:
            pass
        try:
            return content(arrival)
        except TransferError as error:
            return str(error)

    arrived = run(scenario())
    assert (
        "was released" in arrived
        if isinstance(arrived, str)
        else np.array_equal(arrived, message(STORED, 8))
    )


def test_a_message_is_there_as_often_as_it_is_asked_for_until_it_is_released(seam, channel):
    async def scenario():
        stream = seam.call(2)
        await stream.item()
        async with channel.received(stream) as handle:
            for _ in range(2):
                assert np.array_equal(content(await channel.fetch(handle)), message(seed=2))
        with pytest.raises(TransferError, match="was released"):
            await channel.fetch(handle)
        await idle(seam)

    run(scenario())


def test_messages_do_not_mix(seam):
    async def scenario():
        arrived = await asyncio.gather(*(fetched(seam, seed, STORED) for seed in range(5)))
        await idle(seam)
        return arrived

    for seed, arrived in enumerate(run(scenario())):
        assert np.array_equal(arrived, message(STORED, seed))


def test_the_first_item_does_not_wait_for_the_message(seam, channel):
    async def scenario():
        stream = seam.call(3, waits="message")
        assert await stream.item() == "small"
        assert await seam.num_active() == 1
        await seam.go_on()
        async with channel.received(stream) as handle:
            assert np.array_equal(content(await channel.fetch(handle)), message(seed=3))
        await idle(seam)

    run(scenario())


def test_a_producer_that_dies_after_its_message_loses_nothing(seam, channel):
    async def scenario():
        stream = seam.call(4, STORED)
        await stream.item()
        async with channel.received(stream) as handle:
            await seam.die()
            await asyncio.sleep(0.2)
            arrived = content(await channel.fetch(handle))
        assert channel.pinned_bytes == 0
        return arrived

    assert np.array_equal(run(scenario()), message(STORED, 4))


def test_a_producer_that_dies_before_its_message_is_a_lost_transfer(seam, channel):
    async def scenario():
        async with AsyncExitStack() as held:
            await held.enter_async_context(channel.reserved(INLINE))
            stream = seam.call(waits="message")
            await stream.item()
            waiting = asyncio.ensure_future(held.enter_async_context(channel.received(stream)))
            await asyncio.sleep(0.05)
            await seam.die()
            with pytest.raises(TransferError, match="prefill the prompt again"):
                await waiting
        assert channel.pinned_bytes == 0

    run(scenario())


def test_a_call_without_a_message_is_a_lost_transfer(seam):
    async def scenario():
        with pytest.raises(TransferError, match="without its KV message"):
            await fetched(seam, fails="silently")
        await idle(seam)

    run(scenario())


@pytest.mark.parametrize("fails", ["first", "message"])
def test_what_the_producer_raises_is_raised_as_it_was(seam, fails):
    async def scenario():
        with pytest.raises(DeadlineError, match=f"no {fails} today"):
            await fetched(seam, fails=fails)
        await idle(seam)

    run(scenario())


@pytest.mark.parametrize("waits", ["first", "message"])
def test_whoever_stops_waiting_for_an_item_and_closes_the_stream_stops_the_call(seam, waits):
    async def scenario():
        async def active() -> bool:
            return await seam.num_active() == 1

        task = asyncio.ensure_future(fetched(seam, waits=waits))
        await soon(active)
        await asyncio.sleep(0.1)
        assert seam.channel.pinned_bytes == INLINE
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(seam)

    run(scenario())


def test_a_stream_that_is_left_between_its_items_and_closed_stops_the_call(seam):
    async def scenario():
        async with aclosing(seam.call(waits="message")) as stream:
            await stream.item()
        await stream.aclose()
        await idle(seam)

    run(scenario())


def test_what_fails_while_it_owns_a_message_gives_all_of_it_back(seam, channel):
    async def scenario():
        handles = []

        async def fail():
            async with channel.reserved(700):
                stream = seam.call()
                await stream.item()
                async with channel.received(stream) as handle:
                    handles.append(handle)
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        with pytest.raises(TransferError):
            await channel.fetch(handles[0])
        await idle(seam)

    run(scenario())


async def in_parts(seam: Any, stream: Any) -> list[np.ndarray]:
    """The parts of a message, each fetched and released before the next, and the last one."""
    arrived = []
    while (await stream.item()) == "part":
        handle = await seam.channel.part(stream)
        arrived.append(content(await seam.channel.fetch(handle)))
        seam.channel.release(handle)
        with pytest.raises(TransferError, match="was released"):
            await seam.channel.fetch(handle)
    async with seam.channel.received(stream) as handle:
        arrived.append(content(await seam.channel.fetch(handle)))
    return arrived


@pytest.mark.parametrize("length", [INLINE, STORED])
def test_parts_arrive_while_the_call_goes_on(seam, length):
    async def scenario():
        async with aclosing(seam.call(5, length, waits="first", num_parts=3)) as stream:
            arriving = asyncio.ensure_future(in_parts(seam, stream))
            await asyncio.sleep(0.3)
            assert not arriving.done()
            await seam.go_on()
            arrived = await arriving
        await idle(seam)
        return arrived

    arrived = run(scenario())
    assert len(arrived) == 4
    for number, part in enumerate(arrived):
        assert np.array_equal(part, message(length, 5 + number))


def test_parts_of_a_call_that_ended_outlive_their_producer(seam, channel):
    """Decode may be far behind when prefill ends."""

    async def scenario():
        stream = seam.call(6, STORED, num_parts=2)
        handles = []
        while (await stream.item()) == "part":
            handles.append(await channel.part(stream))
        async with channel.received(stream) as last:
            await seam.die()
            await asyncio.sleep(0.2)
            return [content(await channel.fetch(handle)) for handle in (*handles, last)]

    arrived = run(scenario())
    assert all(np.array_equal(part, message(STORED, 6 + n)) for n, part in enumerate(arrived))


def test_a_producer_that_dies_before_a_part_is_a_lost_transfer(seam, channel):
    """Ray gives up the parts of a call that did not end, but nobody can use them anyway."""

    async def scenario():
        stream = seam.call(6, STORED, waits="part 1", num_parts=2)
        await stream.item()
        await channel.part(stream)
        await stream.item()
        waiting = asyncio.ensure_future(channel.part(stream))
        await asyncio.sleep(0.05)
        await seam.die()
        with pytest.raises(TransferError, match="prefill the prompt again"):
            await channel.fetch(await waiting)

    run(scenario())


def test_an_exception_in_place_of_a_part_is_raised_as_it_was(seam, channel):
    async def scenario():
        async with aclosing(seam.call(fails="part 0", num_parts=1)) as stream:
            await stream.item()
            with pytest.raises(DeadlineError, match="no part 0 today"):
                await channel.fetch(await channel.part(stream))
        await idle(seam)

    run(scenario())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("seam", [pytest.param("cluster", marks=pytest.mark.ray)], indirect=True)
def test_a_message_that_ray_moved_to_disk_arrives(seam, channel):
    """A store that others fill spills what nobody reads at the moment."""
    import ray
    from ray.experimental import get_object_locations
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Filler:
        """Holds more and more of the store of one node."""

        def __init__(self) -> None:
            self._held: list[Any] = []

        def fill(self, num_bytes: int) -> None:
            self._held.append(ray.put(np.zeros(num_bytes, np.uint8)))

    async def scenario():
        async with aclosing(seam.call(7, 10 * STORED)) as stream:
            assert await stream.item() == "small"
            async with channel.received(stream) as handle:

                def place() -> dict[str, Any]:
                    return get_object_locations([handle.reference])[handle.reference]

                (node,) = place()["node_ids"]
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                filler = ray.remote(num_cpus=0)(Filler).options(scheduling_strategy=there).remote()

                async def is_on_disk() -> bool:
                    """Which objects go first is left to chance, so more and more are put there."""
                    await filler.fill.remote(20 << 20)
                    return bool(place()["did_spill"])

                await soon(is_on_disk)
                ray.kill(filler)
                return content(await channel.fetch(handle))

    assert np.array_equal(run(scenario()), message(10 * STORED, 7))
