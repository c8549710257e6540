"""Prefill, decode and unified servers as plain objects: queues, leases, deadlines; no cluster."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rayapp.distributed.serve.messages import (
    Address,
    Handover,
    MisdirectedError,
    Place,
    Refusal,
)
from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.replicas.stage import StageModel
from rayapp.distributed.serve.replicas.unified_server import UnifiedServer
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.channel import LocalChannel, LocalStream
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import (
    DeadlineError,
    OverloadedError,
    RequestError,
    UnavailableError,
    WireError,
)
from rayapp.models.blocks import signature_of
from rayapp.models.loading import LoadedModel
from rayapp.plan import PruningPlan

PROMPT = tuple(range(3, 40))
HERE = Place("here", "node")


@pytest.fixture(scope="module")
def stage(tiny_model, byte_tokenizer):
    model = tiny_model("llama")
    loaded = LoadedModel(model, byte_tokenizer, signature_of(model), Path(), 0)
    return StageModel(loaded, PruningPlan(), 256)


def request_of(name, max_tokens=12, **sampling):
    return GenerationRequest(name, PROMPT, SamplingParams(max_tokens=max_tokens, **sampling))


class Pair:
    """A prefill and a decode server with a channel between them."""

    def __init__(
        self, stage, *, max_num_seqs=2, max_waiting=8, max_num_batched_tokens=16, **deadlines
    ):
        self.versions = stage.versions
        self.channel = LocalChannel()
        self.prefill = PrefillServer(
            stage,
            HERE,
            max_waiting=max_waiting,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.decode = DecodeServer(
            stage,
            HERE,
            fetch=self.channel.fetch,
            max_num_seqs=max_num_seqs,
            deadlines=Deadlines(**deadlines),
        )

    @asynccontextmanager
    async def prefilled(self, request):
        items = self.prefill.prefill(request, self.versions, 5.0)
        async with aclosing(LocalStream(items)) as stream:
            answer = await stream.first()
            async with self.channel.received(stream) as handle:
                yield answer, handle

    async def admitted(self, request, wait_s=5.0, replay=()):
        async with self.prefilled(request) as (answer, handle):
            handover = Handover(request, self.versions, answer.first, replay, wait_s)
            return answer, await self.decode.admit(handover, [handle])

    async def rest(self, request):
        tokens = []
        async with aclosing(self.decode.tokens(request.request_id, request.attempt)) as batches:
            async for batch in batches:
                tokens.extend(batch.token_ids)
        return tokens

    async def check_idle(self):
        for _ in range(200):
            counts = {**await self.prefill.check_integrity(), **await self.decode.check_integrity()}
            if not any(counts.values()):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(counts)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 60))


def expected_tokens(stage, request):
    pipeline = LocalPipeline(stage.loaded.model, stage.loaded.tokenizer)
    return list(pipeline.generate([request.prompt_token_ids], request.sampling)[0].token_ids)


def test_many_at_once_equal_one_at_a_time(stage):
    requests = [request_of(f"r{n}", max_tokens=8 + n, temperature=0.8, seed=n) for n in range(6)]

    async def scenario():
        pair = Pair(stage)

        async def answer(request):
            first, _ = await pair.admitted(request)
            return [*first.first.token_ids, *await pair.rest(request)]

        answers = await asyncio.gather(*map(answer, requests))
        await pair.check_idle()
        return answers

    assert run(scenario()) == [expected_tokens(stage, request) for request in requests]


def test_unified_equals_the_reference(stage):
    requests = [request_of(f"u{n}", max_tokens=9, temperature=0.8, seed=n) for n in range(4)]

    async def scenario():
        server = UnifiedServer(
            stage,
            HERE,
            max_num_seqs=2,
            max_waiting=8,
            max_num_batched_tokens=16,
            deadlines=Deadlines(),
        )

        async def answer(request):
            tokens = []
            async with aclosing(server.generate(request, stage.versions)) as items:
                answer = await anext(items)
                tokens.extend(answer.first.token_ids)
                await anext(items)
                async for batch in items:
                    tokens.extend(batch.token_ids)
            return tokens

        answers = await asyncio.gather(*map(answer, requests))
        await asyncio.sleep(0.1)
        assert not any((await server.check_integrity()).values())
        return answers

    assert run(scenario()) == [expected_tokens(stage, request) for request in requests]


def test_a_later_attempt_replays_what_is_out(stage):
    request = request_of("again", max_tokens=20, temperature=0.9, seed=4)
    whole = expected_tokens(stage, request)

    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        await pair.admitted(request)
        later = replace(request, attempt=1)
        await pair.admitted(later, replay=tuple(whole[:9]))  # the only slot changes hands
        tokens = await pair.rest(later)
        with pytest.raises(UnavailableError):
            await pair.rest(request)
        await pair.check_idle()
        return tokens

    assert run(scenario()) == whole[9:]


def test_a_lease_that_nobody_reads_ends(stage):
    async def scenario():
        pair = Pair(stage, lease_s=0.2)
        request = request_of("unread", max_tokens=200, ignore_eos=True)
        await pair.admitted(request)
        assert (await pair.decode.check_integrity())["leases"] == 1
        await asyncio.sleep(0.3)
        with pytest.raises(UnavailableError, match="holds no slot"):
            await pair.rest(request)
        await pair.check_idle()

    run(scenario())


def test_an_answer_has_a_deadline(stage):
    async def scenario():
        pair = Pair(stage, decode_s=0.05)
        request = request_of("slow", max_tokens=200, ignore_eos=True)
        await pair.admitted(request)
        with pytest.raises(DeadlineError, match="did not finish"):
            await pair.rest(request)
        await pair.check_idle()

    run(scenario())


def test_no_slot_in_time_is_a_deadline_and_frees_the_wait(stage):
    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        holder = request_of("holder", max_tokens=200, ignore_eos=True)
        await pair.admitted(holder)
        with pytest.raises(DeadlineError, match="no decode slot"):
            await pair.admitted(request_of("waiter"), wait_s=0.05)
        await pair.decode.cancel("holder", 0)
        await pair.check_idle()

    run(scenario())


def test_cancelling_at_any_moment_frees_everything(stage):
    async def scenario():
        pair = Pair(stage, max_num_seqs=2, lease_s=0.1)
        for number in range(25):
            request = request_of(f"c{number}", max_tokens=100, ignore_eos=True)
            task = asyncio.ensure_future(pair.admitted(request))
            await asyncio.sleep(0.0015 * number)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await pair.check_idle()
        request = request_of("fine")
        first, _ = await pair.admitted(request)
        assert [*first.first.token_ids, *await pair.rest(request)] == expected_tokens(
            stage, request
        )
        await pair.check_idle()

    run(scenario())


@pytest.mark.parametrize("copying", [False, True])
def test_an_attempt_cancelled_while_its_kv_is_loaded_is_not_admitted(stage, copying):
    """The caller left, and its word comes before the answer that it waited for."""

    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        request = request_of("left", max_tokens=100, ignore_eos=True)
        release = threading.Event()
        blocking = pair.decode._thread.submit(release.wait)
        fetched = asyncio.Event()
        fetch = pair.decode._fetch

        async def slowly(handle):
            await (asyncio.sleep(0) if copying else fetched.wait())
            return await fetch(handle)

        pair.decode._fetch = slowly
        admission = asyncio.ensure_future(pair.admitted(request))
        while not pair.decode._num_slots_held:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        await pair.decode.cancel("left", 0)
        fetched.set()
        await asyncio.sleep(0.01)
        release.set()
        await blocking
        with pytest.raises(UnavailableError, match="was cancelled"):
            await admission
        await pair.check_idle()

    run(scenario())


def test_an_attempt_cancelled_before_it_comes_is_not_admitted_and_the_next_one_is(stage):
    """Nothing orders a call and its cancellation on their way to a replica."""

    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        await pair.decode.cancel("overtaken", 0)
        with pytest.raises(UnavailableError, match="was cancelled before it came"):
            await pair.admitted(request_of("overtaken"))
        await pair.check_idle()
        again = replace(request_of("overtaken"), attempt=1)
        first, _ = await pair.admitted(again)
        answer = [*first.first.token_ids, *await pair.rest(again)]
        assert answer == expected_tokens(stage, again)
        await pair.check_idle()

    run(scenario())


def test_an_attempt_cancelled_while_it_waits_for_a_slot_gets_none(stage):
    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        await pair.admitted(request_of("holder", max_tokens=200, ignore_eos=True))
        waiter = asyncio.ensure_future(pair.admitted(request_of("waiter")))
        while not pair.decode._num_waiting:
            await asyncio.sleep(0.001)
        await pair.decode.cancel("waiter", 0)
        await pair.decode.cancel("holder", 0)
        with pytest.raises(UnavailableError, match="was cancelled before it came"):
            await waiter
        await pair.check_idle()

    run(scenario())


def test_only_the_latest_cancellations_are_remembered(stage, monkeypatch):
    monkeypatch.setattr("rayapp.distributed.serve.replicas.leases._MAX_CANCELLED", 2)

    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        for name in ("first", "second", "first", "third"):
            await pair.decode.cancel(name, 0)
        await pair.admitted(request_of("second"))
        with pytest.raises(UnavailableError, match="was cancelled before it came"):
            await pair.admitted(request_of("first"))
        await pair.decode.cancel("second", 0)
        await pair.check_idle()

    run(scenario())


@pytest.fixture
def held():
    """``held(thread)``: the thread does nothing until the returned event is set."""
    releases = []

    def hold(thread):
        releases.append(threading.Event())
        thread.submit(releases[-1].wait)
        return releases[-1]

    yield hold
    for release in releases:
        release.set()


def test_a_cancelled_prompt_leaves_the_queue_at_once(stage, held):
    async def scenario():
        pair = Pair(stage, max_waiting=2)
        release = held(pair.prefill._queue._thread)

        async def prefilled(name):
            async with pair.prefilled(request_of(name)) as (answer, _):
                return answer

        waiting = [asyncio.ensure_future(prefilled(f"q{n}")) for n in range(2)]
        await asyncio.sleep(0.01)
        assert pair.prefill.queued_tokens == 2 * len(PROMPT) - 16  # 16 are in the first step.
        with pytest.raises(OverloadedError, match="the limit is 2"):
            await prefilled("third")
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        assert pair.prefill.record_autoscaling_stats() == {"queued_tokens": len(PROMPT)}
        with pytest.raises(DeadlineError, match="no turn"):
            await anext(pair.prefill.prefill(request_of("late"), pair.versions, 0.05))
        release.set()
        await waiting[1]
        await pair.check_idle()

    run(scenario())


def test_a_short_prompt_passes_a_long_one_and_neither_answer_changes(stage):
    long = replace(request_of("long"), prompt_token_ids=PROMPT * 6)

    async def scenario():
        pair = Pair(stage, max_num_seqs=4)
        ended = []

        async def answer(request):
            first, _ = await pair.admitted(request)
            ended.append(request.request_id)
            return [*first.first.token_ids, *await pair.rest(request)]

        answers = [asyncio.ensure_future(answer(long))]
        while not pair.prefill._queue.num_running:
            await asyncio.sleep(0)
        answers.append(asyncio.ensure_future(answer(request_of("short"))))
        tokens = await asyncio.gather(*answers)
        assert ended == ["short", "long"]
        await pair.check_idle()
        return tokens

    expected = [expected_tokens(stage, request) for request in (long, request_of("short"))]
    assert run(scenario()) == expected


def test_a_prompt_that_cannot_begin_fails_alone(stage):
    async def scenario():
        pair = Pair(stage, max_num_batched_tokens=256)
        broken = replace(request_of("broken"), prompt_token_ids=(1, 9999))
        results = await asyncio.gather(
            pair.admitted(broken), pair.admitted(request_of("fine")), return_exceptions=True
        )
        assert isinstance(results[0], RequestError)
        await pair.rest(request_of("fine"))
        await pair.check_idle()

    run(scenario())


def test_a_step_that_raises_ends_its_prompts_and_not_the_replica(stage, monkeypatch):
    async def scenario():
        pair = Pair(stage, max_num_batched_tokens=256)
        engine, failures = pair.prefill._engine, [ValueError("broken")]
        advance = engine.advance
        monkeypatch.setattr(
            engine, "advance", lambda chunks: _raise(failures) if failures else advance(chunks)
        )
        with pytest.raises(ValueError, match="broken"):
            await pair.admitted(request_of("first"))
        await pair.admitted(request_of("second"))
        await pair.rest(request_of("second"))
        await pair.check_idle()

    run(scenario())


def _raise(failures):
    raise failures.pop()


def test_finished_kv_leaves_while_the_engine_is_busy(stage, held):
    async def scenario():
        pair = Pair(stage, max_num_batched_tokens=256)
        items = pair.prefill.prefill(request_of("done"), pair.versions, 5.0)
        async with aclosing(LocalStream(items)) as stream:
            await stream.first()
            held(pair.prefill._queue._thread)
            async with pair.channel.received(stream) as handle:
                assert (await pair.channel.fetch(handle)).nbytes > 0

    run(scenario())


def test_kv_of_another_request_is_refused_and_its_slot_freed(stage):
    async def scenario():
        pair = Pair(stage)
        async with pair.prefilled(request_of("mine")) as (answer, handle):
            handover = Handover(request_of("other"), pair.versions, answer.first, (), 5.0)
            with pytest.raises(WireError, match="request_id"):
                await pair.decode.admit(handover, [handle])
        await pair.check_idle()

    run(scenario())


@pytest.mark.parametrize("change", [{"plan_fingerprint": "other"}, {"dtype": "bfloat16"}])
def test_another_version_refuses_without_touching_anything(stage, change):
    async def scenario():
        pair = Pair(stage)
        ours = pair.versions
        pair.versions = replace(ours, **change)
        items = pair.prefill.prefill(request_of("old"), pair.versions, 5.0)
        assert isinstance(await anext(items), Refusal)
        with pytest.raises(StopAsyncIteration):
            await anext(items)
        handover = Handover(request_of("old"), pair.versions, None, (), 5.0)
        refusal = await pair.decode.admit(handover, [None])
        assert f"runs {ours}, the request needs {pair.versions}" in refusal.reason
        assert "in float32" in str(ours)
        await pair.check_idle()

    run(scenario())


def test_a_call_for_a_replica_that_has_gone_is_refused(stage):
    async def scenario():
        pair = Pair(stage)
        with pytest.raises(MisdirectedError, match="elsewhere is gone"):
            await anext(pair.decode.tokens("r", 0, Address("elsewhere")))

    run(scenario())


def test_a_failed_step_ends_its_requests_not_the_replica(stage, monkeypatch):
    async def scenario():
        pair = Pair(stage)
        request = request_of("unlucky", max_tokens=50, ignore_eos=True)
        step = pair.decode._engine.step

        def broken():
            raise RuntimeError("a kernel failed")

        monkeypatch.setattr(pair.decode._engine, "step", broken)
        await pair.admitted(request)
        with pytest.raises(UnavailableError, match=r"a kernel failed|holds no slot"):
            await pair.rest(request)
        monkeypatch.setattr(pair.decode._engine, "step", step)
        await pair.check_idle()
        lucky = request_of("lucky")
        first, _ = await pair.admitted(lucky)
        assert [*first.first.token_ids, *await pair.rest(lucky)] == expected_tokens(stage, lucky)
        await pair.check_idle()

    run(scenario())
