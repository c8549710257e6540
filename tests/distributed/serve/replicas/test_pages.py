"""A decode server whose pages run short: who waits, who takes turns, and who is handed back."""

from __future__ import annotations

import asyncio

import pytest

from rayapp.engine.sequences.memory import KVMemory
from rayapp.errors import DeadlineError, PreemptedError
from tests.distributed.serve.replicas.pair import Pair, expected_tokens, request_of, run


def memory_of(stage, num_sequences, **options):
    """Pages for so many sequences of the longest length."""
    config = stage.loaded.model.config
    entry = 2 * config.num_key_value_heads * config.head_dim * 4 * config.num_hidden_layers
    return KVMemory(num_bytes=int(num_sequences * stage.max_model_len * entry), **options)


def test_answers_take_turns_where_pages_run_short(stage):
    requests = [request_of(f"r{i}", max_tokens=120, ignore_eos=True) for i in range(5)]

    async def scenario():
        pair = Pair(stage, max_num_seqs=5, memory=memory_of(stage, 1, aside_bytes=1 << 30))

        async def answer(request):
            found, _ = await pair.admitted(request, wait_s=50.0)
            return [*found.firsts[0].token_ids, *await pair.rest(request)]

        answers = await asyncio.gather(*map(answer, requests))
        await pair.check_idle()
        return answers

    assert all(answer == expected_tokens(stage, requests[0]) for answer in run(scenario()))


def test_an_answer_without_room_anywhere_is_handed_back(stage):
    requests = [request_of(f"r{i}", max_tokens=200, ignore_eos=True) for i in range(3)]

    async def scenario():
        memory = memory_of(stage, 1, aside_bytes=0)
        pair = Pair(stage, max_num_seqs=3, memory=memory)
        for request in requests:
            await pair.admitted(request, wait_s=20.0)
        whole = await pair.rest(requests[0])
        for request in requests[1:]:
            with pytest.raises(PreemptedError, match=f"{request.request_id} gave its pages of KV"):
                await pair.rest(request)
        await pair.check_idle()
        return whole

    assert run(scenario()) == expected_tokens(stage, requests[0])[1:]


def test_a_prompt_that_finds_no_room_in_time_is_told_so(stage):
    first, second = (request_of(f"r{i}", max_tokens=200, ignore_eos=True) for i in range(2))

    async def scenario():
        pair = Pair(stage, max_num_seqs=2, memory=memory_of(stage, 1, block_size=256))
        await pair.admitted(first)
        with pytest.raises(DeadlineError, match=r"no (room for the prompt's KV|decode slot)"):
            await pair.admitted(second, wait_s=0.05)
        await pair.decode.cancel("r0", 0)
        await pair.check_idle()

    run(scenario())
