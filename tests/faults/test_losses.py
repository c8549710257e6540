"""Replicas that die and KV that is damaged, on the real path: no answer is lost or changed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import ExitStack, aclosing, asynccontextmanager

import psutil
import pytest
import ray

from rayapp.distributed.serve.channel import ObjectHandle, ObjectStoreChannel
from rayapp.distributed.serve.ingress.calls import ask_all
from rayapp.distributed.serve.ingress.ingress import open_service
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import DeadlineError, UnavailableError
from rayapp.kv.pieces import Message

pytestmark = pytest.mark.ray

# So long that no part of the KV travels inside a message of Ray (100 KB), but through the stores.
PROMPT = tuple((7 * i + i * i) % 250 for i in range(360))
SAMPLING = SamplingParams(max_tokens=150, temperature=0.7, seed=3, ignore_eos=True)


@pytest.fixture(autouse=True)
def service(standard):
    """Lost replicas come back by themselves; a test needs all of them to begin with."""
    standard.wait_whole()
    yield standard
    standard.check_idle()


@pytest.fixture(scope="module")
def expected(tiny_model):
    (completion,) = LocalPipeline(tiny_model("llama")).generate([PROMPT], SAMPLING)
    return list(completion.token_ids)


class FlippingChannel(ObjectStoreChannel):
    """Damages the first ``num_damaged`` messages on their way, or parts of them; counts all.

    ``on_first`` is called once, before decode hears of the first message or part. With ``never``,
    decode is told to fetch that from a part on, or in place of the last message.
    """

    num_damaged = 0
    num_damaged_parts = 0
    never: ray.ObjectRef | None = None
    never_from_part = 0
    num_received = 0
    num_parts = 0
    on_first = staticmethod(lambda: None)

    def _tell(self):
        told, self.on_first = self.on_first, lambda: None
        told()

    async def part(self, stream):
        handle = await super().part(stream)
        self._tell()
        self.num_parts += 1
        if self.never is not None and self.num_parts >= self.never_from_part > 0:
            handle = ObjectHandle(self.never)
        if self.num_damaged_parts:
            self.num_damaged_parts -= 1
            handle = await self._damaged(handle)
        return handle

    async def _damaged(self, handle):
        message = (await self.fetch(handle)).flat()
        message[len(message) // 2] ^= 4
        return ObjectHandle(ray.put(Message((message,))))

    @asynccontextmanager
    async def received(self, stream):
        async with super().received(stream) as handle:
            self._tell()
            self.num_received += 1
            if self.never is not None:
                yield ObjectHandle(self.never)
            elif self.num_damaged:
                self.num_damaged -= 1
                yield await self._damaged(handle)
            else:
                yield handle


def opened(service, *, max_kv_bytes=None, **deadlines):
    channel = FlippingChannel(max_pinned_bytes=max_kv_bytes)
    pools = {name: service.handle(name) for name in ("prefill", "decode")}
    changed = service.settings.deadlines.model_copy(update=deadlines)
    settings = service.settings.model_copy(update={"deadlines": changed})
    return open_service(settings, pools, service.handle("ingress"), channel), channel


async def answered(generator, on_token=None):
    tokens = []
    async with aclosing(generator) as batches:
        async for batch in batches:
            assert batch.first_index == len(tokens)
            tokens.extend(batch.token_ids)
            if on_token is not None:
                await on_token(len(tokens))
    return tokens


def run(scenario):
    """The result of a scenario, once everything that it left to do in the background is done.

    The calls that free what an attempt had go on after its end, as they do in a server; here the
    event loop ends, too.
    """

    async def whole():
        try:
            return await scenario
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                await asyncio.wait(others, timeout=60)

    return asyncio.run(whole())


async def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def num_booked(service):
    """Prompts that decode has promised room."""
    found = await ask_all(service.handle("decode"), "check_integrity")
    return sum(held["bookings"] for held in found)


def request_of(name):
    return GenerationRequest(name, PROMPT, SAMPLING)


def test_damaged_kv_is_never_used(service, expected):
    stage, channel = opened(service)
    channel.num_damaged = 1
    assert run(answered(stage.generate([request_of("flipped")]))) == expected
    assert [record.attempt for record in stage.ledger.recent] == [1]


def test_a_damaged_part_of_kv_is_never_used(service, expected):
    stage, channel = opened(service)
    channel.num_damaged_parts = 1
    assert run(answered(stage.generate([request_of("part-flipped")]))) == expected
    assert [record.attempt for record in stage.ledger.recent] == [1]
    assert channel.num_parts > 2


def test_parts_of_kv_equal_its_bytes_and_hide_behind_the_prefill(service, expected):
    stage, channel = opened(service)
    assert run(answered(stage.generate([request_of("parts")]))) == expected
    assert channel.num_parts >= 2  # of 128 tokens or fewer, at least; then comes the rest of 360
    (record,) = stage.ledger.recent
    assert record.bytes_sent - record.overhead_bytes == record.bytes_full
    assert min(record.prefill_s, record.put_s, record.fetch_s, record.copy_s) > 0
    assert 0 <= record.hidden_s <= record.put_s + record.fetch_s + record.copy_s


def test_kv_that_is_always_damaged_ends_in_a_clear_error(service):
    stage, channel = opened(service)
    channel.num_damaged = 99
    with pytest.raises(UnavailableError, match=r"3 attempts were lost.*checksum"):
        run(answered(stage.generate([request_of("hopeless")])))
    assert not any(stage.counts().values())


@pytest.mark.parametrize(
    ("frozen", "deadlines", "message"),
    [
        ("prefill", {"queue_s": 2.0, "prefill_s": 0.5}, r"prefill did not end within 2\.5 s"),
        ("decode", {"queue_s": 0.7}, r"queue did not end within 0\.7 s"),
    ],
)
def test_a_frozen_pool_ends_in_a_deadline_that_frees_everything(
    service, frozen, deadlines, message
):
    stage, _ = opened(service, **deadlines)

    async def scenario():
        with (
            service.stopped(*service.replicas(frozen).values()),
            pytest.raises(DeadlineError, match=message),
        ):
            await answered(stage.generate([request_of(f"late-{frozen}")]))

    run(scenario())
    assert not any(stage.counts().values())


def test_decode_that_freezes_before_it_takes_kv_over_ends_in_a_deadline(service):
    """It had booked room, so the prompt was prefilled."""
    stage, channel = opened(service, transfer_s=0.7)
    decode = service.replicas("decode").values()

    async def scenario():
        with ExitStack() as frozen:
            channel.on_first = lambda: frozen.enter_context(service.stopped(*decode))
            with pytest.raises(DeadlineError, match=r"transfer did not end within 0\.7 s"):
                await answered(stage.generate([request_of("late-transfer")]))

    run(scenario())
    assert not any(stage.counts().values())


@pytest.mark.parametrize("from_part", [0, 2])
def test_a_fetch_that_never_ends_ends_in_a_deadline(service, expected, from_part):
    """Of a whole message's place, or of a part behind others that were copied."""

    def sleep():
        time.sleep(3600)

    endless = ray.remote(num_cpus=0)(sleep).remote()
    stage, channel = opened(service, transfer_s=1.0)
    channel.never, channel.never_from_part = endless, from_part
    try:
        with pytest.raises(DeadlineError, match=r"transfer did not end within 1\.0 s"):
            run(answered(stage.generate([request_of(f"endless-{from_part}")])))
        assert channel.num_parts >= from_part
        assert not any(stage.counts().values())
        service.check_idle()  # while the fetch would still go on
        channel.never = None
        assert run(answered(stage.generate([request_of(f"after-{from_part}")]))) == expected
    finally:
        ray.cancel(endless, force=True)


def test_a_frozen_answer_ends_in_a_deadline_that_frees_everything(service):
    stage, _ = opened(service, decode_s=1.0)
    frozen = ExitStack()

    async def freeze(num_tokens):
        if num_tokens > 5:
            frozen.enter_context(service.stopped(*service.replicas("decode").values()))

    async def scenario():
        with frozen, pytest.raises(DeadlineError, match=r"decode did not end within 1\.0 s"):
            await answered(stage.generate([request_of("late")]), freeze)

    run(scenario())
    assert not any(stage.counts().values())


def test_kv_under_way_is_bounded(service, expected):
    """Room for one prompt's KV: the others wait for it, and all are answered."""
    stage, channel = opened(service, max_kv_bytes=500_000)
    seen = []

    async def watch(num_tokens):
        seen.append(channel.pinned_bytes)

    async def scenario():
        requests = [request_of(f"bounded-{n}") for n in range(4)]
        return await asyncio.gather(*(answered(stage.generate([r]), watch) for r in requests))

    assert run(scenario()) == [expected] * 4
    assert 0 < max(seen) <= 500_000
    assert channel.pinned_bytes == 0


def test_prefill_killed_after_it_answered_loses_nothing(service, expected):
    """Decode freezes, so the KV is still under way when both prefill replicas are killed."""
    stage, channel = opened(service)
    decode, prefill = service.replicas("decode").values(), service.replicas("prefill").values()

    async def scenario():
        with ExitStack() as frozen:
            channel.on_first = lambda: frozen.enter_context(service.stopped(*decode))
            answer = asyncio.ensure_future(answered(stage.generate([request_of("after")])))
            await until(lambda: channel.num_received)
            assert channel.pinned_bytes > 100_000
            for pid in prefill:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not any(map(psutil.pid_exists, prefill)))
        return await answer

    assert run(scenario()) == expected
    assert [record.attempt for record in stage.ledger.recent] == [0]
    assert not any(stage.counts().values())


def test_prefill_killed_before_it_answered_is_prefilled_again(service):
    """Several prompts wait in the queue of each replica; all of one replica are lost."""
    stage, _ = opened(service)
    killed = []

    async def kill(num_tokens):
        if not killed:
            killed.extend(list(service.replicas("prefill").values())[:1])
            os.kill(killed[0], signal.SIGKILL)

    async def scenario():
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        requests = [GenerationRequest(f"lost-{n}", PROMPT, sampling) for n in range(20)]
        return await asyncio.gather(*(answered(stage.generate([r]), kill) for r in requests))

    answers = run(scenario())
    assert killed
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]) == 3
    assert not any(stage.counts().values())


@pytest.mark.slow
def test_prefill_killed_between_two_parts_is_prefilled_again(service, expected):
    """Every replica is frozen after the first part, and the one that has the prompt is killed."""
    stage, channel = opened(service)

    async def scenario():
        prefill = service.replicas("prefill")
        answer = asyncio.ensure_future(answered(stage.generate([request_of("between")])))
        await until(lambda: channel.num_parts)
        with service.stopped(*prefill.values()):
            for pid in prefill.values():
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not any(map(psutil.pid_exists, prefill.values())))
        return await answer

    assert run(scenario()) == expected
    assert not any(stage.counts().values())


@pytest.mark.slow
def test_decode_killed_while_parts_come_is_replaced_by_another(service, expected):
    """What it had copied is lost with it: the prompt is prefilled again, for another replica."""
    stage, channel = opened(service)

    async def scenario():
        prefill, decode = service.replicas("prefill"), service.replicas("decode")
        with ExitStack() as frozen:
            stop = service.stopped(*decode.values())
            channel.on_first = lambda: frozen.enter_context(stop)
            answer = asyncio.ensure_future(answered(stage.generate([request_of("copying")])))
            await until(lambda: channel.num_parts >= 2)
        with service.stopped(*prefill.values()):
            busy: set[str] = set()
            while not busy and not answer.done():
                replicas = (await stage.health()).replicas
                busy = {r.replica_id for r in replicas if r.num_running and r.pool == "decode"}
            for replica_id in busy & set(decode):
                os.kill(decode[replica_id], signal.SIGKILL)
        return await answer

    assert run(scenario()) == expected
    assert not any(stage.counts().values())


def test_decode_killed_in_the_middle_of_an_answer(service, expected):
    """The tokens that are out are replayed, sampled ones included; none comes twice or changes."""
    stage, _ = opened(service)
    killed = []

    async def kill(num_tokens):
        if num_tokens > 20 and not killed:
            busy = {r.replica_id for r in (await stage.health()).replicas if r.num_running}
            assert len(busy) == 1
            killed.append(service.replicas("decode")[busy.pop()])
            os.kill(killed[0], signal.SIGKILL)

    assert run(answered(stage.generate([request_of("middle")]), kill)) == expected
    assert killed
    assert [record.attempt for record in stage.ledger.recent] == [0, 1]


@pytest.mark.slow
def test_decode_killed_before_it_admitted_hands_the_same_kv_to_another(service, expected):
    """Both decode replicas freeze once they have booked room; one dies, and the other goes on."""
    stage, channel = opened(service)
    names = [f"unadmitted-{n}" for n in range(4)]  # as many as one replica alone has room for

    async def scenario():
        lost, other = service.replicas("decode").values()
        with ExitStack() as frozen:
            with service.stopped(*service.replicas("prefill").values()):
                requests = [stage.generate([request_of(name)]) for name in names]
                answers = asyncio.gather(*map(answered, requests))
                while await num_booked(service) < len(names):
                    await asyncio.sleep(0.02)
                frozen.enter_context(service.stopped(lost, other))
            await until(lambda: channel.num_received == len(names))
            os.kill(lost, signal.SIGKILL)
            await until(lambda: not psutil.pid_exists(lost))
        return await answers

    assert run(scenario()) == [expected] * len(names)
    assert [record.attempt for record in stage.ledger.recent] == [0] * len(names)
