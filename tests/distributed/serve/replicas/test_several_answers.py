"""Several answers to one prompt: one prefill, one message, one admission, and a slot for each."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rayapp.distributed.serve.replicas.stage import StageModel
from rayapp.errors import UnavailableError
from rayapp.models.blocks import signature_of
from rayapp.plan import PruningPlan
from tests.distributed.serve.replicas.pair import (
    PROMPT,
    Pair,
    expected_tokens,
    prompt_of,
    request_of,
    run,
)
from tests.distributed.serve.replicas.test_pages import memory_of
from tests.distributed.serve.replicas.test_unified_server import (
    answers_of,
    check_idle,
    server_of,
)


def several(count, **sampling):
    settings = {"max_tokens": 12, "temperature": 0.9, **sampling}
    return [request_of(f"answer-{n}", seed=100 + n, **settings) for n in range(count)]


def expected(stage, requests):
    return {request.request_id: expected_tokens(stage, request) for request in requests}


def joined(answer, rest):
    """First tokens and the rest, by name."""
    return {
        first.request_id: [*first.token_ids, *rest.get(first.request_id, [])]
        for first in answer.firsts
    }


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_they_equal_separate_requests_and_run_in_turns_where_slots_are_few(stage, count):
    requests = several(count)

    async def scenario():
        pair = Pair(stage, max_num_seqs=3)
        passes = counted_passes(pair.prefill.engine)
        answer, _ = await pair.admitted(*requests)
        rest = await pair.rest(*requests)
        await pair.check_idle()
        assert sum(passes) == len(PROMPT)
        return joined(answer, rest if count > 1 else {requests[0].request_id: rest})

    assert run(scenario()) == expected(stage, requests)


def counted_passes(engine):
    advance, passes = engine.advance, []

    def counted(chunks):
        passes.append(sum(count for _, count in chunks))
        return advance(chunks)

    engine.advance = counted
    return passes


def test_decode_may_make_their_first_tokens(stage):
    plan = PruningPlan.model_validate(
        {"first_token": "decode", "model": signature_of(stage.loaded.model).model_dump()}
    )
    decoding = StageModel(stage.loaded, plan, stage.max_model_len)
    requests = several(5)

    async def scenario():
        pair = Pair(decoding, max_num_seqs=2)
        answer, _ = await pair.admitted(*requests)
        assert answer.firsts == ()
        rest = await pair.rest(*requests)
        await pair.check_idle()
        return rest

    assert run(scenario()) == expected(decoding, requests)


def test_many_prompts_with_many_answers_share_few_slots(stage):
    """Answers that wait for slots hold none that others need, whatever the order."""
    groups = [
        [replace(r, request_id=f"{number}-{r.request_id}") for r in several(1 + number % 5)]
        for number in range(8)
    ]

    async def scenario():
        pair = Pair(stage, max_num_seqs=3, max_waiting=20)

        async def answers(requests):
            answer, _ = await pair.admitted(*requests, wait_s=30.0)
            rest = await pair.rest(*requests)
            return joined(answer, rest if len(requests) > 1 else {requests[0].request_id: rest})

        found = await asyncio.gather(*map(answers, groups))
        await pair.check_idle()
        return found

    assert run(scenario()) == [expected(stage, requests) for requests in groups]


def test_an_answer_that_ends_with_its_first_token_takes_no_slot(stage):
    requests = several(3)
    requests[0] = replace(requests[0], sampling=several(1, max_tokens=1)[0].sampling)

    async def scenario():
        pair = Pair(stage, max_num_seqs=2)
        answer, _ = await pair.admitted(*requests)
        assert [first.finish_reason for first in answer.firsts] == ["length", None, None]
        assert (await pair.decode.check_integrity())["waiting"] == 0
        rest = await pair.rest(*requests)
        await pair.check_idle()
        return joined(answer, rest)

    assert run(scenario()) == expected(stage, requests)


def test_all_answers_may_end_with_their_first_token(stage):
    requests = several(3, max_tokens=1)

    async def scenario():
        pair = Pair(stage)
        items = pair.prefill.prefill(prompt_of(*requests), pair.versions, 5.0)
        (answer,) = [item async for item in items]
        assert answer.kv_bytes is None
        await pair.check_idle()
        return joined(answer, {})

    assert run(scenario()) == expected(stage, requests)


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_answers_that_find_no_room_together_are_placed_one_after_the_other(stage, num_sequences):
    """They have slots, but pages for few of them at a time."""
    requests = several(4)

    async def scenario():
        memory = memory_of(stage, num_sequences, block_size=256)
        pair = Pair(stage, max_num_seqs=4, memory=memory)
        answer, _ = await pair.admitted(*requests, wait_s=30.0)
        rest = await pair.rest(*requests)
        await pair.check_idle()
        return joined(answer, rest)

    assert run(scenario()) == expected(stage, requests)


@pytest.mark.parametrize("count", [2, 5])
def test_a_later_attempt_replays_what_every_answer_has_sent(stage, count):
    """Answers that are complete take no part; the others go on where they were."""
    requests = several(count, max_tokens=20, ignore_eos=True)
    whole = expected(stage, requests)

    async def scenario():
        pair = Pair(stage, max_num_seqs=2)
        await pair.admitted(*requests)
        lost = {name: tokens[: 3 * n] for n, (name, tokens) in enumerate(whole.items())}
        later = [replace(r, attempt=1) for r in requests]
        answer, _ = await pair.admitted(*later, sent=lost)
        rest = await pair.rest(*later)
        with pytest.raises(UnavailableError):
            await pair.rest(*requests)
        await pair.check_idle()
        firsts = joined(answer, {})
        return {name: [*(lost[name] or firsts[name]), *rest[name]] for name in whole}

    assert run(scenario()) == whole


@pytest.mark.parametrize("waits", [False, True])
def test_cancelling_frees_the_slots_of_all_and_the_wait_for_more(stage, waits):
    requests = several(5, max_tokens=150, ignore_eos=True)

    async def scenario():
        pair = Pair(stage, max_num_seqs=2 if waits else 5)
        await pair.admitted(*requests)
        await asyncio.sleep(0.02)
        counts = await pair.decode.check_integrity()
        assert (counts["slots"], counts["waiting"]) == ((2, 3) if waits else (5, 0))
        await pair.decode.cancel("answer-0", 0)
        with pytest.raises(UnavailableError):
            await pair.rest(*requests)
        await pair.check_idle()
        fine = request_of("fine")
        answer, _ = await pair.admitted(fine)
        assert [*answer.firsts[0].token_ids, *await pair.rest(fine)] == expected_tokens(stage, fine)
        await pair.check_idle()

    run(scenario())


def test_cancelling_them_at_any_moment_frees_everything(stage):
    async def scenario():
        pair = Pair(stage, max_num_seqs=2, lease_s=0.05)
        for number in range(25):
            requests = [
                replace(r, request_id=f"{number}-{r.request_id}")
                for r in several(4, max_tokens=10, ignore_eos=True)
            ]

            async def answers(requests=requests):
                await pair.admitted(*requests)
                return await pair.rest(*requests)

            task = asyncio.ensure_future(answers())
            await asyncio.sleep(0.002 * number)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await pair.check_idle()

    run(scenario())


def test_one_unified_replica_answers_them_too(stage):
    requests = several(6)

    async def scenario():
        server = server_of(stage, max_num_seqs=4)
        answers = await answers_of(server, stage, *requests)
        await check_idle(server)
        return answers

    assert run(scenario()) == expected(stage, requests)
