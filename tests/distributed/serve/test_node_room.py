"""The account of a node's KV: fair, never for ever, and given back whoever dies."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from rayapp.distributed.serve import callers as watched
from rayapp.distributed.serve import node_room
from rayapp.distributed.serve.callers import Callers
from rayapp.distributed.serve.ingress.ingress import open_service
from rayapp.distributed.serve.node_room import _NAMESPACE, NodeRoom, NodeRooms, RoomKeeper, _name
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import UnavailableError

LIMIT = 1000
IDLE = {"bytes": 0, "attempts": 0}


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 120))


class Keeping:
    """A keeper in this process, and attempts that ask it for room."""

    def __init__(self, dead=()):
        self.dead = set(dead)
        self.keeper = RoomKeeper(Callers(lambda name: name not in self.dead))
        self.asking = {}

    async def ask(self, name, num_bytes, *owners):
        taking = self.keeper.take((name, 0), num_bytes, owners)
        self.asking[name] = asyncio.ensure_future(taking)
        await asyncio.sleep(0.01)

    async def give(self, name):
        await self.keeper.give((name, 0))
        await asyncio.sleep(0.01)

    @property
    def inside(self):
        return {name for name, asked in self.asking.items() if asked.done() and asked.result()}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(watched, "PERIOD_S", 0.005)


def test_a_long_prompt_is_not_overtaken_by_short_ones():
    async def scenario():
        keeping = Keeping()
        await keeping.keeper.join("", LIMIT)
        await keeping.ask("first", 700)
        await keeping.ask("long", 900)
        for number in range(20):  # Each would fit beside the first, and has come later.
            await keeping.ask(f"short-{number}", 100)
        assert keeping.inside == {"first"}
        await keeping.give("first")
        assert keeping.inside == {"first", "long", "short-0"}
        await keeping.give("long")
        assert "short-9" in keeping.inside
        assert "short-10" not in keeping.inside
        for name in keeping.asking:
            await keeping.give(name)
        assert await keeping.keeper.counts() == IDLE

    run(scenario())


def test_more_than_the_limit_goes_alone():
    async def scenario():
        keeping = Keeping()
        await keeping.keeper.join("", LIMIT)
        await keeping.ask("small", 1)
        await keeping.ask("huge", 50 * LIMIT)
        assert keeping.inside == {"small"}
        await keeping.give("small")
        assert keeping.inside == {"small", "huge"}
        await keeping.ask("next", 1)
        assert "next" not in keeping.inside
        await keeping.give("huge")
        assert "next" in keeping.inside
        await keeping.give("next")
        assert await keeping.keeper.counts() == IDLE

    run(scenario())


@pytest.mark.parametrize("dies", ["replica", "ingress"])
def test_what_a_dead_owner_holds_or_waits_for_is_given_back(dies):
    async def scenario():
        keeping = Keeping()
        await keeping.keeper.join("other", LIMIT)
        await keeping.ask("held", 900, "replica", "ingress")
        await keeping.ask("waits", 900, "replica", "ingress")
        await keeping.ask("another's", 900, "other")
        keeping.dead.add(dies)
        await asyncio.sleep(0.1)
        assert keeping.inside == {"held", "another's"}
        assert keeping.asking["waits"].result() is False  # Nobody wants it any more.
        assert await keeping.keeper.counts() == {"bytes": 900, "attempts": 1}
        await keeping.give("held")
        await keeping.give("another's")
        assert await keeping.keeper.counts() == IDLE

    run(scenario())


def test_room_is_given_once_however_often_it_is_told():
    async def scenario():
        keeping = Keeping()
        await keeping.keeper.join("", LIMIT)
        await keeping.ask("one", 600)
        await keeping.ask("two", 300)
        for _ in range(3):
            await keeping.give("one")
        await keeping.give("nobody")
        assert await keeping.keeper.counts() == {"bytes": 300, "attempts": 1}

    run(scenario())


def test_an_attempt_that_is_over_before_it_asks_gets_no_room(monkeypatch):
    monkeypatch.setattr(node_room, "_MAX_OVER", 2)

    async def scenario():
        keeping = Keeping()
        await keeping.keeper.join("", LIMIT)
        for name in ("forgotten", "late", "later"):
            await keeping.give(name)
        for name in ("late", "later", "forgotten"):
            await keeping.ask(name, 1)
        assert keeping.inside == {"forgotten"}
        assert await keeping.keeper.counts() == {"bytes": 1, "attempts": 1}

    run(scenario())


def test_a_new_limit_holds_for_those_who_wait():
    async def scenario():
        keeping = Keeping()
        await keeping.keeper.join("", LIMIT)
        await keeping.ask("one", 900)
        await keeping.ask("two", 900)
        await keeping.keeper.join("", 2 * LIMIT)
        await asyncio.sleep(0.01)
        assert keeping.inside == {"one", "two"}

    run(scenario())


@pytest.fixture
def node(cluster):
    return cluster.nodes[1].node_id


def keeper_of(node_id):
    import ray

    return ray.get_actor(_name(node_id), _NAMESPACE)


async def until(condition):
    deadline = time.monotonic() + 60
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


class Owner:
    """An actor that owns KV, and computes nothing."""

    def ready(self):
        return True


@pytest.mark.ray
def test_an_account_outlives_a_replica_and_ends_with_the_last(node):
    import ray

    def owner(name):
        made = ray.remote(num_cpus=0)(Owner).options(name=name, namespace="serve").remote()
        ray.get(made.ready.remote())
        return made

    async def scenario():
        replicas, ingress = [owner("room-a"), owner("room-b")], owner("room-ingress")
        one, two = (NodeRoom(node, LIMIT, name) for name in ("room-a", "room-b"))
        await one.take(("first", 0), 900, "room-ingress")
        waiting = asyncio.ensure_future(two.take(("second", 0), 900, "room-ingress"))
        ingress_side = NodeRooms()

        async def are_two():
            return (await two.counts())["attempts"] == 2

        await until(are_two)
        ray.kill(replicas[0])  # It started the account, and it owned the first attempt.
        await waiting
        assert await two.counts() == {"bytes": 900, "attempts": 1}
        cancelled = asyncio.ensure_future(two.take(("third", 0), 900, "room-ingress"))
        await asyncio.sleep(0.2)
        cancelled.cancel()
        ingress_side.give(node, ("second", 0))

        async def is_idle():
            return await two.counts() == IDLE

        await until(is_idle)
        await two.take(("fourth", 0), 900, "room-ingress")
        ray.kill(ingress)
        await until(is_idle)
        waiting = asyncio.ensure_future(two.take(("fifth", 0), 1, ""))
        await waiting
        given_up = asyncio.ensure_future(two.take(("sixth", 0), LIMIT, ""))
        await asyncio.sleep(0.2)
        ingress_side.give(node, ("sixth", 0))
        with pytest.raises(UnavailableError, match="given up"):
            await given_up
        keeper = keeper_of(node)
        ray.kill(keeper)  # Nobody is refused for want of an account.
        await two.take(("seventh", 0), 900, "")
        ray.kill(replicas[1])

        async def has_ended():
            try:
                keeper_of(node)
            except ValueError:
                return True
            return False

        await until(has_ended)

    run(scenario())


@pytest.mark.ray
def test_two_replicas_of_a_node_share_its_room(deploy, tiny_llama, tiny_model):
    """Prompts of several ingresses; more wait than there is room for, and all are answered."""
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    prompts = [tuple((7 * i + kind) % 250 for i in range(150 + kind)) for kind in range(12)]
    local = LocalPipeline(tiny_model("llama"))
    wanted = [list(c.token_ids) for c in local.generate(prompts, sampling)]
    kv_bytes = 150 * 5 * 2 * 2 * 16 * 4  # Entries, blocks, keys and values, heads, dim, float32.
    options = {
        "model": str(tiny_llama),
        "max_num_batched_tokens": 512,
        "kv_part_ms": 0.0,
        "max_node_kv_bytes": int(2.5 * kv_bytes),
        "prefill": {"replicas": 2, "labels": {"role": "prefill"}},
        "decode": {"replicas": 1, "labels": {"role": "decode"}},
    }

    async def answered(stage, number):
        tokens = []
        request = GenerationRequest(f"room-{number}", prompts[number], sampling)
        async with aclosing(stage.generate([request])) as batches:
            async for batch in batches:
                tokens += batch.token_ids
        return tokens

    async def scenario(service):
        pools = {name: service.handle(name) for name in ("prefill", "decode")}
        stages = [
            open_service(service.settings, pools, service.handle("ingress")) for _ in range(2)
        ]
        (place,) = {r["node"] for r in service.health["pools"]["prefill"]}
        keeper, seen = keeper_of(place), []
        asking = [
            asyncio.ensure_future(answered(stages[number % 2], number))
            for number in range(len(prompts))
        ]
        while not all(one.done() for one in asking):
            seen.append(await keeper.counts.remote())
            await asyncio.sleep(0.002)

        async def is_idle():
            return await keeper.counts.remote() == IDLE

        await until(is_idle)
        return [one.result() for one in asking], seen

    with deploy(**options) as service:
        answers, seen = run(scenario(service))
        service.check_idle()
    assert answers == wanted
    assert 2 * kv_bytes <= max(found["bytes"] for found in seen) <= 2.5 * kv_bytes
    assert max(found["attempts"] for found in seen) > 2  # The others waited, in both replicas.
