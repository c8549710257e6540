"""Calls to replicas through Serve's own handles, with a router that answers on cue; no cluster."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import httpx
import pytest
from ray.serve.context import (
    _get_serve_request_context,
    _RequestContext,
    _serve_request_context,
)

from rayapp.api.routes import build_app
from rayapp.distributed.serve.messages import (
    Address,
    Refusal,
)
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.request import GenerationRequest, SamplingParams, TokenBatch
from rayapp.errors import DeadlineError
from tests.distributed.serve.scripted_router import (
    BOOKED,
    EVERYBODY,
    PLACE,
    PREFILLED,
    PROMPT,
    RAY_TASK,
    Routed,
    Router,
    last_batch,
    service_over,
    tokens_of,
)

INGRESS = "rayapp.distributed.serve.ingress"
# The other phases have all the time they need, on a busy machine too.
SHORT = {
    "queue": Deadlines(queue_s=0.2),
    "prefill": Deadlines(queue_s=0.1, prefill_s=0.1),
    "transfer": Deadlines(transfer_s=0.2),
    "decode": Deadlines(decode_s=0.2),
}


def test_every_call_of_one_http_request_has_an_id_of_its_own(byte_tokenizer):
    """Two calls under one id: Serve's router finds the first only, and the second waits forever."""
    context = _RequestContext(request_id="http", _internal_request_id="http", app_name="rayapp")

    async def scenario():
        _serve_request_context.set(context)
        for mode in ("disaggregated", "unified"):
            service = service_over(router, byte_tokenizer, mode=mode)
            answers = await asyncio.gather(*(tokens_of(service, f"{mode}-{n}") for n in range(3)))
            assert answers == [[7]] * 3
        return _get_serve_request_context()

    router = Router()
    assert asyncio.run(scenario()) == context
    assert sorted(call.name for call in router.calls) == sorted(
        ["prefill", "admit", "follow", "generate"] * 3 + ["deliver"] * 2
    )
    found = [call.metadata for call in router.calls]
    internal_ids = {metadata.internal_request_id for metadata in found}
    assert len(internal_ids) == len(found)
    assert "http" not in internal_ids
    of_requests = [call.metadata for call in router.calls if call.name != "deliver"]
    assert {(m.request_id, m.app_name) for m in of_requests} == {("http", "rayapp")}


@pytest.mark.parametrize(
    ("mode", "method", "phase"),
    [
        ("disaggregated", "book", "queue"),
        ("disaggregated", "prefill", "prefill"),
        ("disaggregated", "admit", "transfer"),
        ("disaggregated", "deliver", "decode"),
        ("unified", "generate", "prefill"),
    ],
)
def test_a_call_that_is_never_routed_ends_in_its_phases_deadline(
    byte_tokenizer, mode, method, phase
):
    async def scenario():
        router = Router()
        del router.scripts[method]
        service = service_over(router, byte_tokenizer, mode=mode, deadlines=SHORT[phase])
        begun = time.monotonic()
        with pytest.raises(DeadlineError, match=rf"^{phase} did not end within 0\.[12] s"):
            await tokens_of(service, max_tokens=2)
        assert time.monotonic() - begun < 20
        assert not any(service.counts().values())
        await asyncio.sleep(0.05)
        # Of a request's own calls; the shared one waits for whoever comes next.
        found = [call.found.cancelled() for call in router.calls if call.name == method]
        assert found == [method != "deliver"]

    asyncio.run(scenario())


def test_a_deadline_is_told_in_time_though_nobody_answers_the_withdrawal(byte_tokenizer):
    """Replicas that hang hear of it once they go on; the word to them waits behind the answer."""

    async def scenario():
        router = Router()
        router.scripts["admit"] = lambda *_: Admitting()
        router.answers.clear()
        service = service_over(router, byte_tokenizer, deadlines=SHORT["transfer"])
        begun = time.monotonic()
        with pytest.raises(DeadlineError, match=r"^transfer did not end within 0\.2 s"):
            await tokens_of(service)
        assert time.monotonic() - begun < SHORT["transfer"].lease_s / 2
        assert not any(service.counts().values())
        router.answers.set()
        await asyncio.sleep(0.05)
        assert [call.name for call in router.calls] == ["prefill", "admit", "cancel"]

    asyncio.run(scenario())


def test_a_client_is_told_that_nothing_was_routed(byte_tokenizer):
    async def scenario():
        router = Router()
        router.scripts.clear()
        service = service_over(router, byte_tokenizer, deadlines=SHORT["prefill"])
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://it") as client:
            for stream in (False, True):
                body = {"prompt": ["a", "b"], "n": 2, "stream": stream}
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 504
                assert "queue did not end within" in reply.json()["error"]["message"]
        booking = [call for call in router.calls if call.name == "book"]
        assert len(booking) == 2 * len(body["prompt"])
        assert all(call.found.cancelled() for call in booking)
        assert {call.name for call in router.calls} == {"book", "cancel"}
        assert not any(service.counts().values())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("mode", "method", "phase"),
    [
        ("disaggregated", "book", "queue"),
        ("disaggregated", "prefill", "prefill"),
        ("disaggregated", "admit", "transfer"),
        ("unified", "generate", "prefill"),
    ],
)
def test_refusals_do_not_go_on_for_ever(byte_tokenizer, mode, method, phase):
    """Every replica is of another version, and stays it."""

    async def scenario():
        router = Router()
        router.scripts[method] = lambda *_: [Refusal(PLACE, "another plan")]
        longer = {"transfer_s": 0.5} if phase == "transfer" else {"queue_s": 0.5}
        deadlines = SHORT[phase].model_copy(update=longer)
        service = service_over(router, byte_tokenizer, mode=mode, deadlines=deadlines)
        with pytest.raises(DeadlineError, match=rf"^{phase} did not end within 0\.[56] s"):
            await asyncio.wait_for(tokens_of(service, max_tokens=2), 5)
        assert not any(service.counts().values())

    asyncio.run(scenario())


class Admitting:
    """An admission that is routed; what the replica answers stays on its way."""

    async def get_async(self):
        await asyncio.sleep(60)

    def cancel(self):
        pass


@pytest.mark.parametrize(
    "left", ["while_it_is_admitted", "once_it_is_admitted", "while_it_is_read"]
)
def test_leaving_ends_what_decode_has_admitted(byte_tokenizer, left):
    """The word to decode is no call of the request's Ray task: Ray cancels such calls with it."""

    async def scenario():
        RAY_TASK.set("request")
        router = Router()
        first = TokenBatch("r", 0, 0, (7,))
        router.scripts["prefill"] = lambda *_: [replace(PREFILLED, firsts=(first,)), b"the message"]
        if left == "while_it_is_admitted":
            router.scripts["admit"] = lambda *_: Admitting()
        elif left == "while_it_is_read":
            router.scripts["admit"] = lambda *_: router.deliver(TokenBatch("r", 0, 1, (8,)))
        service = service_over(router, byte_tokenizer)
        request = GenerationRequest("r", PROMPT, SamplingParams(max_tokens=4))

        async def leave(num_batches):
            batches = service.generate([request])
            async with aclosing(batches):
                for _ in range(num_batches):
                    await anext(batches)
                await asyncio.sleep(0.05)

        await leave(2 if left == "while_it_is_read" else 1)
        assert not any(service.counts().values())
        reading = ["follow", "deliver"] if left == "while_it_is_read" else []
        names = [call.name for call in router.calls]
        assert names == ["book", "prefill", "admit", *reading, "cancel"]
        assert router.calls[2].address.preferred == PLACE.replica_id
        last = router.calls[-1]
        place = EVERYBODY if left == "while_it_is_admitted" else Address(PLACE.replica_id)
        assert (last.arguments, last.address) == (("r", 0), place)
        outside = {call.name for call in router.calls if call.ray_task is None}
        assert outside == {"cancel", *reading[1:]}

    asyncio.run(scenario())


def test_nothing_is_prefilled_before_decode_has_room(byte_tokenizer, monkeypatch):
    """Decode promises room late; a client that leaves before is withdrawn everywhere."""

    async def scenario():
        router = Router()
        promised = asyncio.Event()
        router.scripts["book"] = lambda *_: Promising(promised)
        service = service_over(router, byte_tokenizer, deadlines=Deadlines())
        answer = asyncio.ensure_future(tokens_of(service, "r", max_tokens=4))
        leaves = asyncio.ensure_future(tokens_of(service, "leaves", max_tokens=4))
        await asyncio.sleep(0.05)
        assert [call.name for call in router.calls] == ["book", "book"]
        assert service.report.waiting_tokens == 2 * len(PROMPT)
        monkeypatch.setattr(f"{INGRESS}.disaggregated.wait_s", lambda pool: 3.0)
        assert service.report.waiting_tokens == 0  # it is decode that is short of room
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        last = router.calls[-1]
        assert (last.name, last.arguments, last.address) == ("cancel", ("leaves", 0), EVERYBODY)
        promised.set()
        assert await answer == [7]
        names = [call.name for call in router.calls[3:]]
        assert names[:2] == ["prefill", "admit"]
        assert "cancel" not in names
        assert not any(service.counts().values())

    asyncio.run(scenario())


def test_an_answer_that_prefill_makes_alone_needs_no_room_in_decode(byte_tokenizer):
    async def scenario():
        router = Router()
        only = replace(PREFILLED, firsts=(last_batch("r"),), kv_bytes=None)
        router.scripts["prefill"] = lambda *_: [only]
        service = service_over(router, byte_tokenizer)
        assert await tokens_of(service, max_tokens=1) == [7]
        assert [call.name for call in router.calls] == ["prefill"]

    asyncio.run(scenario())


def test_room_is_given_back_where_the_first_token_ends_the_answer(byte_tokenizer):
    async def scenario():
        router = Router()
        only = replace(PREFILLED, firsts=(last_batch("r"),), kv_bytes=None)
        router.scripts["prefill"] = lambda *_: [only]
        service = service_over(router, byte_tokenizer)
        assert await tokens_of(service, max_tokens=4) == [7]
        assert [call.name for call in router.calls] == ["book", "prefill", "cancel"]
        assert router.calls[-1].address == Address(PLACE.replica_id)

    asyncio.run(scenario())


class Promising:
    """A booking that is routed, and promised once an event is set."""

    def __init__(self, promised):
        self.promised = promised

    async def get_async(self):
        await self.promised.wait()
        return BOOKED

    def cancel(self):
        pass


@pytest.mark.parametrize("left", ["while_it_is_prefilled", "while_it_is_read"])
def test_leaving_tells_a_unified_replica(byte_tokenizer, left):
    async def scenario():
        router = Router()
        first = TokenBatch("r", 0, 0, (7,))
        router.scripts["generate"] = lambda *_: (
            Prefilling()
            if left == "while_it_is_prefilled"
            else [replace(PREFILLED, firsts=(first,)), *router.deliver(TokenBatch("r", 0, 1, (8,)))]
        )
        service = service_over(router, byte_tokenizer, mode="unified")
        answer = asyncio.ensure_future(tokens_of(service, max_tokens=4, num_batches=2))
        await asyncio.sleep(0.05)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        assert not any(service.counts().values())
        reading = ["deliver"] if left == "while_it_is_read" else []
        assert [call.name for call in router.calls] == ["generate", *reading, "cancel"]
        place = EVERYBODY if left == "while_it_is_prefilled" else Address(PLACE.replica_id)
        assert (router.calls[-1].arguments, router.calls[-1].address) == (("r", 0), place)

    asyncio.run(scenario())


class Prefilling(Routed):
    """A prefill that goes on for long."""

    def __init__(self):
        super().__init__([])

    async def __anext__(self):
        await asyncio.sleep(60)


def test_a_second_cancellation_does_not_stop_the_word_to_decode(byte_tokenizer):
    """A client that leaves may cancel twice: our own watch does, and so may Serve."""

    async def scenario():
        router = Router()
        del router.scripts["deliver"], router.scripts["cancel"]
        service = service_over(router, byte_tokenizer)
        answer = asyncio.ensure_future(tokens_of(service))
        await asyncio.sleep(0.05)
        for _ in range(2):
            answer.cancel()
            await asyncio.sleep(0.01)
        assert answer.cancelled()
        assert [c.found.done() for c in router.calls if c.name == "cancel"] == [False]
        assert not any(service.counts().values())

    asyncio.run(scenario())
