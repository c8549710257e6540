"""Retries, replay and admission of the ingress, with attempts that fail on cue; no cluster."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from rayapp.api.service import ReplicaHealth, ServiceDescription
from rayapp.distributed.serve.ingress.ray_service import Limits, RayService
from rayapp.distributed.serve.messages import Versions
from rayapp.engine.channel import LocalChannel
from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import (
    DeadlineError,
    IntegrityError,
    OverloadedError,
    PreemptedError,
    RequestError,
    UnavailableError,
    WireError,
)
from rayapp.kv.ledger import Ledger
from rayapp.scaling.admission import Room

ANSWER = (5, 6, 7, 8)
REPLICA = ReplicaHealth(
    pool="decode",
    replica_id="d",
    node="n",
    parameter_bytes=1,
    plan_fingerprint="p",
    weights_fingerprint="w",
    dtype="float32",
)


def task_error(cause):
    return RayTaskError("f", "traceback", cause).as_instanceof_cause()


class Script:
    """One entry per attempt: how many tokens of the answer come, then what is raised."""

    def __init__(self, *entries):
        self.entries = list(entries)
        self.seen = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def run(self, answering):
        request = answering.prompt.prompt
        self.seen.append((request.attempt, tuple(answering.sent.get(request.request_id, ()))))
        num_tokens, error = self.entries.pop(0)
        await self.hold.wait()
        for index in range(num_tokens):
            reason = "length" if index + 1 == len(ANSWER) else None
            yield TokenBatch(request.request_id, request.attempt, index, (ANSWER[index],), reason)
        if error is not None:
            raise error


def service_of(script, tokenizer, max_waiting=2, pools=None):
    return RayService(
        ServiceDescription("m", 64, 300, tokenizer),
        pools=pools or {},
        siblings=None,
        attempts=script,
        channel=LocalChannel(),
        ledger=Ledger(),
        versions=Versions("p", "w", "float32"),
        limits=Limits(max_waiting=max_waiting, max_attempts=3),
    )


async def tokens_of(service, name="r"):
    request = GenerationRequest(name, (1, 2), SamplingParams(max_tokens=4))
    tokens = []
    async with aclosing(service.generate([request])) as batches:
        async for batch in batches:
            assert batch.first_index == len(tokens)
            tokens.extend(batch.token_ids)
    return tuple(tokens)


@pytest.mark.parametrize(
    "error", [ActorDiedError(), task_error(WireError("damaged")), UnavailableError("no slot here")]
)
def test_lost_work_is_done_again_and_no_token_comes_twice(byte_tokenizer, error):
    async def scenario():
        script = Script((2, error), (0, error), (4, None))
        service = service_of(script, byte_tokenizer)
        assert await tokens_of(service) == ANSWER
        assert script.seen == [(0, ()), (1, (5, 6)), (2, (5, 6))]
        assert not any(service.counts().values())

    asyncio.run(scenario())


def test_an_answer_that_lacks_tokens_is_computed_again(byte_tokenizer):
    class Gap(Script):
        async def run(self, answering):
            async for batch in super().run(answering):
                if (batch.attempt, batch.first_index) != (0, 1):
                    yield batch

    async def scenario():
        script = Gap((4, None), (4, None))
        assert await tokens_of(service_of(script, byte_tokenizer)) == ANSWER
        assert script.seen == [(0, ()), (1, (5,))]

    asyncio.run(scenario())


def test_a_service_that_is_drained_ends_its_answers_and_takes_no_others(byte_tokenizer):
    async def scenario():
        script = Script((4, None))
        service = service_of(script, byte_tokenizer)
        script.hold.clear()
        running = asyncio.ensure_future(tokens_of(service))
        await asyncio.sleep(0)
        assert service.drain() == 1
        with pytest.raises(UnavailableError, match="about to end"):
            await tokens_of(service, "late")
        script.hold.set()
        assert await running == ANSWER
        assert service.drain() == 0

    asyncio.run(scenario())


def test_an_attempt_that_was_preempted_is_not_counted(byte_tokenizer, monkeypatch):
    monkeypatch.setattr("rayapp.distributed.serve.ingress.ray_service._RETRY_PAUSE_S", 0.001)

    async def scenario():
        preempted = task_error(PreemptedError("others came first"))
        entries = [(number % 4, preempted) for number in range(7)]
        script = Script(*entries, (0, ActorDiedError()), (4, None))
        assert await tokens_of(service_of(script, byte_tokenizer)) == ANSWER
        assert [attempt for attempt, _ in script.seen] == list(range(9))

    asyncio.run(scenario())


def test_attempts_are_bounded(byte_tokenizer):
    async def scenario():
        service = service_of(Script(*[(1, ActorDiedError())] * 3), byte_tokenizer)
        with pytest.raises(UnavailableError, match="3 attempts were lost"):
            await tokens_of(service)
        assert not any(service.counts().values())

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [DeadlineError, OverloadedError, RequestError])
def test_what_another_attempt_cannot_mend_is_raised_as_it_was(byte_tokenizer, kind):
    async def scenario():
        script = Script((1, task_error(kind("why"))))
        with pytest.raises(kind, match=r"^why$"):
            await tokens_of(service_of(script, byte_tokenizer))
        assert len(script.seen) == 1

    asyncio.run(scenario())


def test_an_answer_that_stops_short_is_a_loss(byte_tokenizer):
    async def scenario():
        script = Script((2, None), (4, None))
        assert await tokens_of(service_of(script, byte_tokenizer)) == ANSWER

    asyncio.run(scenario())


def test_waiting_places_are_exact(byte_tokenizer):
    async def scenario():
        script = Script(*[(4, None)] * 4)
        service = service_of(script, byte_tokenizer)
        script.hold.clear()
        waiting = [asyncio.ensure_future(tokens_of(service, f"r{n}")) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="2 requests are waiting, and at most 2"):
            await tokens_of(service, "late")
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        script.hold.set()
        assert await tokens_of(service, "next") == await waiting[1] == ANSWER
        assert not any(service.counts().values())

    asyncio.run(scenario())


class Several:
    """Attempts at several answers: per attempt, the tokens of every answer that come."""

    def __init__(self, *entries):
        self.entries = list(entries)
        self.seen = []

    async def run(self, answering):
        self.seen.append(
            {
                r.request_id: tuple(answering.sent.get(r.request_id, ()))
                for r in answering.prompt.requests
            }
        )
        assert {r.attempt for r in answering.prompt.requests} == {len(self.seen) - 1}
        for name, num_tokens in self.entries.pop(0).items():
            for index in range(num_tokens):
                reason = "length" if index + 1 == len(ANSWER) else None
                yield TokenBatch(name, answering.prompt.attempt, index, (ANSWER[index],), reason)
        raise ActorDiedError()


def test_answers_that_have_ended_take_no_part_in_a_later_attempt(byte_tokenizer):
    async def scenario():
        script = Several({"a": 4, "b": 2, "c": 0}, {"b": 4, "c": 1}, {"c": 4})
        service = service_of(script, byte_tokenizer, max_waiting=3)
        requests = [GenerationRequest(n, (1, 2), SamplingParams(max_tokens=4)) for n in "abc"]
        tokens = {name: [] for name in "abc"}
        async with aclosing(service.generate(requests)) as batches:
            async for batch in batches:
                assert batch.first_index == len(tokens[batch.request_id])
                tokens[batch.request_id].extend(batch.token_ids)
        assert tokens == {name: list(ANSWER) for name in "abc"}
        assert script.seen == [
            {"a": (), "b": (), "c": ()},
            {"b": (5, 6), "c": ()},
            {"c": (5,)},
        ]
        assert not any(service.counts().values())

    asyncio.run(scenario())


def test_answers_of_one_prompt_wait_together_or_not_at_all(byte_tokenizer):
    async def scenario():
        service = service_of(Script(), byte_tokenizer, max_waiting=2)
        requests = [GenerationRequest(n, (1, 2), SamplingParams(max_tokens=4)) for n in "abc"]
        with pytest.raises(OverloadedError, match="fewer answers"):
            await anext(service.generate(requests))
        other = GenerationRequest("other", (3,))
        with pytest.raises(IntegrityError, match="share their prompt"):
            await anext(service.generate([requests[0], other]))
        assert not any(service.counts().values())

    asyncio.run(scenario())


def of_prompts(*names):
    """One request for each of as many prompts."""
    sampling = SamplingParams(max_tokens=4)
    return [[GenerationRequest(name, (1, 2, n), sampling)] for n, name in enumerate(names)]


def test_several_prompts_are_admitted_together_or_not_at_all(byte_tokenizer):
    async def scenario():
        script = Script(*[(4, None)] * 3)
        service = service_of(script, byte_tokenizer, max_waiting=3)
        with (
            pytest.raises(OverloadedError, match="fewer answers"),
            service.admitted(of_prompts(*"abcd")),
        ):
            raise AssertionError
        assert not any(service.counts().values())
        with service.admitted(of_prompts(*"abc")):
            with pytest.raises(OverloadedError, match="3 requests are waiting"):
                await tokens_of(service, "other")
            service.drain()  # what was admitted is answered all the same
            assert [await tokens_of(service, name) for name in "abc"] == [ANSWER] * 3
            with pytest.raises(UnavailableError, match="about to end"):
                await tokens_of(service, "d")
        assert not any(service.counts().values())

    asyncio.run(scenario())


def test_prompts_that_are_still_read_have_places(byte_tokenizer):
    async def scenario():
        service = service_of(Script((4, None)), byte_tokenizer, max_waiting=3)
        with service.arriving(2):
            with pytest.raises(OverloadedError), service.arriving(2):
                raise AssertionError
            with service.arriving(1):
                pass
        with service.arriving(3):
            assert await tokens_of(service, "r") == ANSWER

    asyncio.run(scenario())


@pytest.mark.parametrize(("pool", "names", "is_refused"), [
    ("prefill", "a", False), ("prefill", "ab", True), ("decode", "abc", False),
])  # fmt: skip
def test_prompts_that_would_wait_for_too_long_are_refused_at_once(
    byte_tokenizer, monkeypatch, pool, names, is_refused
):
    """A token takes 10 s here, of the one prompt before the last; decode does not wait for them."""
    monkeypatch.setattr(
        "rayapp.distributed.serve.ingress.ray_service.wait_s",
        lambda name, num_tokens: 10.0 * num_tokens,
    )

    async def scenario():
        service = service_of(Script(), byte_tokenizer, max_waiting=9, pools={pool: None})
        service._waiting._room = Room(9, queue_s=25.0)
        if is_refused:
            with pytest.raises(OverloadedError, match=r"30\.0 s of prefill wait") as refused:
                service.admitted(of_prompts(*names)).__enter__()
            assert refused.value.retry_after_s == 5
        else:
            with service.admitted(of_prompts(*names)):
                assert service.counts()["answering"] == 0

    asyncio.run(scenario())


class Asked:
    """A pool that notes how often its replicas are asked, and answers on cue."""

    def __init__(self):
        self.num_calls, self.answer = 0, asyncio.Event()

    def broadcast(self, method):
        assert method == "describe"
        self.num_calls += 1
        return self

    async def results_async(self, **_):
        await self.answer.wait()
        return [REPLICA.model_copy(update={"num_running": self.num_calls})]


def test_replicas_are_asked_once_for_all_who_want_to_know_their_health(byte_tokenizer):
    """The first who asks leaves; the others get the report all the same, later ones a new one."""

    async def scenario():
        pool = Asked()
        service = service_of(Script(), byte_tokenizer, pools={"decode": pool})
        asking = [asyncio.ensure_future(service.health()) for _ in range(20)]
        await asyncio.sleep(0.01)
        asking[0].cancel()
        pool.answer.set()
        reports = await asyncio.gather(*asking[1:])
        assert pool.num_calls == 1
        assert {report.replicas[0].num_running for report in reports} == {1}
        assert (await service.health()).replicas[0].num_running == 2

    asyncio.run(scenario())
