"""The prompts of a prefill server: their queue, their chunks, and steps that fail."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from rayapp.engine.channel import LocalStream
from rayapp.errors import DeadlineError, OverloadedError, RequestError, UnavailableError
from tests.distributed.serve.replicas.pair import (
    PROMPT,
    Pair,
    expected_tokens,
    prompt_of,
    request_of,
    run,
)


def test_a_cancelled_prompt_leaves_the_queue_at_once(stage, held):
    async def scenario():
        pair = Pair(stage, max_waiting=2)
        release = held(pair.prefill._loop.thread)

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
        assert pair.prefill.queued_tokens == len(PROMPT)
        with pytest.raises(DeadlineError, match="no turn"):
            await anext(pair.prefill.prefill(prompt_of(request_of("late")), pair.versions, 0.05))
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
            return [*first.firsts[0].token_ids, *await pair.rest(request)]

        answers = [asyncio.ensure_future(answer(long))]
        while not pair.prefill.queue.num_running:
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
        engine, failures = pair.prefill.engine, [ValueError("broken")]
        advance = engine.advance
        monkeypatch.setattr(
            engine, "advance", lambda chunks: _raise(failures) if failures else advance(chunks)
        )
        with pytest.raises(UnavailableError, match="a prefill step failed: ValueError: broken"):
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
        items = pair.prefill.prefill(prompt_of(request_of("done")), pair.versions, 5.0)
        async with aclosing(LocalStream(items)) as stream:
            await stream.item()
            held(pair.prefill._loop.thread)
            async with pair.channel.received(stream) as handle:
                assert (await pair.channel.fetch(handle)).nbytes > 0

    run(scenario())
