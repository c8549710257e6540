"""Steps that hang, steps that always fail, and steps that find no memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from rayapp.distributed.serve.replicas.engine_loop import _MAX_FAILED, failure_of
from rayapp.errors import DeadlineError, OverloadedError, UnavailableError
from tests.distributed.serve.replicas.pair import (
    Pair,
    expected_tokens,
    request_of,
    run,
)


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_a_step_that_hangs_is_noticed_and_the_replica_is_well_once_it_ends(stage, held, pool):
    async def scenario():
        pair = Pair(stage, step_s=0.05)
        server = getattr(pair, pool)
        release = held(server._loop.thread)
        await server.check_health()
        await asyncio.sleep(0.1)
        with pytest.raises(UnavailableError, match=r"engine thread is in one call for 0\.\d s"):
            await server.check_health()
        release.set()
        await asyncio.sleep(0.02)
        await server.check_health()

    run(scenario())


def test_steps_that_fail_one_after_the_other_are_noticed(stage, monkeypatch):
    async def scenario():
        pair = Pair(stage)
        monkeypatch.setattr(pair.prefill.engine, "advance", lambda _: 1 / 0)
        for number in range(_MAX_FAILED):
            await pair.prefill.check_health()
            with pytest.raises(UnavailableError, match="ZeroDivisionError"):
                await pair.admitted(request_of(str(number)))
        with pytest.raises(UnavailableError, match=f"{_MAX_FAILED} steps failed"):
            await pair.prefill.check_health()
        await pair.check_idle()

    run(scenario())


def test_an_idle_replica_whose_books_disagree_is_noticed(stage):
    async def scenario():
        pair = Pair(stage)
        asked = request_of("first")
        await pair.admitted(asked)
        await pair.rest(asked)
        await pair.decode.check_health()
        # A sheet that belongs to nobody, as a lost reference leaves it.
        leaked = pair.decode.engine.pages.arenas[0].pool.take(1, 1)
        assert leaked is not None
        asked = request_of("second")
        await pair.admitted(asked)
        await pair.rest(asked)
        await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError, match="it lost count: the page pool has 1 sheets"):
            await pair.decode.check_health()

    run(scenario())


TOO_LITTLE = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
]


@pytest.mark.parametrize("error", TOO_LITTLE)
def test_a_prompt_that_finds_too_little_memory_is_refused_with_the_options_that_help(
    stage, monkeypatch, error
):
    async def scenario():
        pair = Pair(stage)
        monkeypatch.setattr(pair.prefill.engine, "advance", raising(error))
        with pytest.raises(OverloadedError, match="lower max_num_seqs"):
            await pair.admitted(request_of("large"))
        await pair.check_idle()

    run(scenario())


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_decode_runs_fewer_sequences_once_memory_did_not_suffice(stage, monkeypatch):
    """What ran is replayed by its caller; it cannot find too little memory for ever."""

    async def scenario():
        pair = Pair(stage, max_num_seqs=4)
        step = pair.decode.engine.step

        def step_of_few():
            if pair.decode.engine.num_running > 2:
                raise TOO_LITTLE[0]
            return step()

        monkeypatch.setattr(pair.decode.engine, "step", step_of_few)

        async def answered(request):
            for attempt in range(4):
                again = replace(request, attempt=attempt)
                try:
                    answer, _ = await pair.admitted(again)
                    return [*answer.firsts[0].token_ids, *await pair.rest(again)]
                except UnavailableError:
                    await asyncio.sleep(0.01)
            raise AssertionError(request)

        requests = [request_of(str(n), max_tokens=20, ignore_eos=True) for n in range(6)]
        answers = await asyncio.gather(*map(answered, requests))
        assert answers == [expected_tokens(stage, request) for request in requests]
        await pair.check_idle()
        assert pair.decode._slots._free._value == 2

    run(scenario())


def test_errors_of_ours_stay_as_they_are():
    error = DeadlineError("too late")
    assert failure_of(error, "decode") is error
