"""What every KV channel promises; the in-process twin here, others join through the fixture."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from rayapp.engine.channel import KVChannel, LocalChannel
from rayapp.errors import OverloadedError, TransferError

BUDGET = 1000


def local_channel() -> Iterator[KVChannel]:
    yield LocalChannel(max_pinned_bytes=BUDGET)


def object_store_channel() -> Iterator[KVChannel]:
    import ray

    from rayapp.distributed.serve.channel import ObjectStoreChannel

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error")
    yield ObjectStoreChannel(max_pinned_bytes=BUDGET)


# Each entry yields one channel with a budget of BUDGET bytes and cleans up after itself.
CHANNELS: dict[str, Callable[[], Iterator[KVChannel]]] = {
    "local": local_channel,
    "object_store": object_store_channel,
}


@pytest.fixture(scope="module", autouse=True)
def _leave_ray() -> Iterator[None]:
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(params=["local", pytest.param("object_store", marks=pytest.mark.ray)])
def channel(request: pytest.FixtureRequest) -> Iterator[KVChannel]:
    yield from CHANNELS[request.param]()


def message(length: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.uint8)


def run(coroutine):
    return asyncio.run(coroutine)


def test_a_message_arrives_as_it_was_sent_as_often_as_asked(channel):
    async def scenario():
        handle = await channel.send(message())
        return [await channel.fetch(handle) for _ in range(2)]

    for arrived in run(scenario()):
        assert arrived.dtype == np.uint8
        assert np.array_equal(arrived, message())


def test_what_arrives_cannot_be_written_to(channel):
    async def scenario():
        return await channel.fetch(await channel.send(message()))

    with pytest.raises(ValueError, match="read-only"):
        run(scenario())[0] = 1


def test_messages_do_not_mix(channel):
    async def scenario():
        handles = [await channel.send(message(seed=seed)) for seed in range(5)]
        return await asyncio.gather(*(channel.fetch(handle) for handle in handles))

    for seed, arrived in enumerate(run(scenario())):
        assert np.array_equal(arrived, message(seed=seed))


def test_idle_means_zero_pinned_bytes(channel):
    async def scenario():
        seen = [channel.pinned_bytes]
        handles = [await channel.send(message(length)) for length in (100, 300)]
        seen.append(channel.pinned_bytes)
        for handle in handles:
            await channel.release(handle)
            seen.append(channel.pinned_bytes)
        return seen

    assert run(scenario()) == [0, 400, 300, 0]


def test_releasing_twice_is_harmless(channel):
    async def scenario():
        handle, other = await channel.send(message()), await channel.send(message(50))
        await channel.release(handle)
        await channel.release(handle)
        assert len(await channel.fetch(other)) == 50
        return channel.pinned_bytes

    assert run(scenario()) == 50


def test_a_released_message_is_gone(channel):
    async def scenario():
        handle = await channel.send(message())
        await channel.release(handle)
        await channel.fetch(handle)

    with pytest.raises(TransferError):
        run(scenario())


def test_the_budget_bounds_what_is_under_way(channel):
    async def scenario():
        first = await channel.send(message(700))
        with pytest.raises(OverloadedError, match="700 bytes of KV are under way"):
            await channel.send(message(301))
        assert channel.pinned_bytes == 700
        await channel.send(message(300))
        await channel.release(first)
        await channel.send(message(700))
        return channel.pinned_bytes

    assert run(scenario()) == BUDGET


@pytest.mark.parametrize("wrong", [np.zeros((2, 3), np.uint8), np.zeros(4, np.float32)])
def test_only_rows_of_bytes_are_taken(channel, wrong):
    with pytest.raises(TransferError, match="1-D uint8"):
        run(channel.send(wrong))
    assert channel.pinned_bytes == 0


def test_an_empty_message_travels_too(channel):
    async def scenario():
        return await channel.fetch(await channel.send(message(0)))

    assert len(run(scenario())) == 0
