"""A unified server: both stages on one loop, whose steps run tokens first and then chunks."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

from rayapp.distributed.serve.messages import Address, Admission, PrefillAnswer
from rayapp.distributed.serve.replicas.unified_server import UnifiedServer
from rayapp.distributed.serve.settings import Deadlines
from rayapp.errors import UnavailableError
from tests.distributed.serve.replicas.pair import (
    HERE,
    PROMPT,
    delivered,
    expected_tokens,
    prompt_of,
    reader_of,
    request_of,
    run,
)


def server_of(stage, *, max_num_seqs=2, max_num_batched_tokens=16):
    return UnifiedServer(
        stage,
        HERE,
        max_num_seqs=max_num_seqs,
        max_waiting=8,
        max_num_batched_tokens=max_num_batched_tokens,
        deadlines=Deadlines(),
    )


async def answers_of(server, stage, *requests):
    """The tokens of all answers to one prompt, by name."""
    tokens = {request.request_id: [] for request in requests}
    prompt, firsts = prompt_of(*requests), []
    reader = reader_of(prompt)

    async def generate():
        call = server.generate(prompt, stage.versions, {}, Address(reader=reader))
        async with aclosing(call) as items:
            async for item in items:
                assert isinstance(item, PrefillAnswer | Admission)
                firsts.extend(getattr(item, "firsts", ()))

    rest = await delivered(server, generate(), reader)
    for batch in (*firsts, *rest):
        tokens[batch.request_id].extend(batch.token_ids)
    return tokens


async def check_idle(server):
    for _ in range(200):
        counts = await server.check_integrity()
        if not any(counts.values()):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(counts)


def test_it_equals_the_reference(stage):
    requests = [request_of(f"u{n}", max_tokens=9, temperature=0.8, seed=n) for n in range(4)]

    async def scenario():
        server = server_of(stage)
        answers = await asyncio.gather(*(answers_of(server, stage, r) for r in requests))
        await check_idle(server)
        return [answer[r.request_id] for answer, r in zip(answers, requests, strict=True)]

    assert run(scenario()) == [expected_tokens(stage, request) for request in requests]


def test_a_running_stream_waits_for_no_more_than_one_step_of_chunks(stage):
    """Between two tokens of a stream, at most one step's budget of prompt tokens is computed."""
    log = []

    async def scenario():
        server = server_of(stage, max_num_seqs=4)
        step, both = server._decode.engine.step, server.joint.engine.step

        def counted(chunks, noted):
            log.extend((sum(count for _, count in chunks), "token"))
            return both(chunks, noted)

        server._decode.engine.step = lambda: (log.append("token"), step())[1]
        server.joint.engine.step = counted
        stream = request_of("stream", max_tokens=60, ignore_eos=True)
        long = [replace(request_of(f"long{n}", 2), prompt_token_ids=PROMPT * 5) for n in range(3)]
        running = asyncio.ensure_future(answers_of(server, stage, stream))
        while "token" not in log:
            await asyncio.sleep(0)
        log.clear()
        await asyncio.gather(*(answers_of(server, stage, request) for request in long))
        seen = list(log)
        assert (await running)["stream"] == expected_tokens(stage, stream)
        await check_idle(server)
        return seen

    seen = run(scenario())
    between, longest = 0, 0
    for entry in seen:
        between = 0 if entry == "token" else between + entry
        longest = max(longest, between)
    assert sum(entry for entry in seen if entry != "token") == 3 * 5 * len(PROMPT)
    assert longest <= 16


@pytest.mark.parametrize("phase", ["before", "prefill", "decode"])
def test_cancelling_ends_an_attempt_in_every_phase(stage, phase, held):
    request = request_of("left", max_tokens=100, ignore_eos=True)

    async def scenario():
        server = server_of(stage)
        release = held(server._prefill._loop.thread) if phase == "prefill" else None
        if phase == "before":
            await server.cancel("left", 0)
        answer = asyncio.ensure_future(answers_of(server, stage, request))
        while phase == "decode" and not server._decode.num_running:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        await server.cancel("left", 0)
        with pytest.raises(UnavailableError, match="cancelled"):
            await answer
        if release is not None:
            release.set()
        await check_idle(server)
        again = replace(request_of("left"), attempt=1)
        assert (await answers_of(server, stage, again))["left"] == expected_tokens(stage, again)

    run(scenario())


def test_nothing_is_prefilled_before_there_is_room_to_decode_it(stage):
    async def scenario():
        server = server_of(stage, max_num_seqs=1)
        first = request_of("first", max_tokens=120, ignore_eos=True)
        second = request_of("second", max_tokens=9)
        running = asyncio.ensure_future(answers_of(server, stage, first))
        while not server._decode.num_running:
            await asyncio.sleep(0.001)
        waiting = asyncio.ensure_future(answers_of(server, stage, second))
        while not server._decode.num_waiting:
            await asyncio.sleep(0)
        prefill = await server._prefill.check_integrity()
        assert not any(prefill.values())
        assert not running.done()
        found = (await running)["first"], (await waiting)["second"]
        await check_idle(server)
        return found

    found = run(scenario())
    assert found[0] == expected_tokens(stage, request_of("first", max_tokens=120, ignore_eos=True))
    assert found[1] == expected_tokens(stage, request_of("second", max_tokens=9))


def test_a_prompt_that_breaks_passes_ends_others_once_and_then_alone(stage, monkeypatch):
    """A pass that raises ends what is in it; for a while, prompts run apart from answers then."""

    async def scenario():
        server = server_of(stage, max_num_seqs=4)
        advance, both = server._prefill.engine.advance, server.joint.engine.step

        def broken(call, chunks, *noted):
            if any(run.requests[0].request_id.startswith("poison") for run, _ in chunks):
                raise ValueError("a broken pass")
            return call(chunks, *noted)

        monkeypatch.setattr(server.joint.engine, "step", partial(broken, both))
        monkeypatch.setattr(server._prefill.engine, "advance", partial(broken, advance))
        long = {"max_tokens": 100, "ignore_eos": True}

        async def poisoned(name, beside):
            while not server._decode.num_running:
                await asyncio.sleep(0.001)
            with pytest.raises(UnavailableError, match="a broken pass"):
                await answers_of(server, stage, request_of(name))
            return await beside

        beside = asyncio.ensure_future(answers_of(server, stage, request_of("one", **long)))
        with pytest.raises(UnavailableError, match="a broken pass"):
            await poisoned("poison1", beside)
        two = request_of("two", **long)
        found = await poisoned("poison2", asyncio.ensure_future(answers_of(server, stage, two)))
        assert found["two"] == expected_tokens(stage, two)
        await check_idle(server)
        server.joint._apart_until_s = 0.0  # As if a minute had gone by.
        pair = [request_of("three", **long), request_of("four", 2)]
        answers = await asyncio.gather(*(answers_of(server, stage, each) for each in pair))
        for each, answer in zip(pair, answers, strict=True):
            assert answer[each.request_id] == expected_tokens(stage, each)
        await check_idle(server)

    run(scenario())
