"""Steps that hang, steps that always fail, and steps that find no memory."""

from __future__ import annotations

import asyncio

import pytest
import torch

from rayapp.distributed.serve.replicas.engine_loop import _MAX_FAILED, failure_of
from rayapp.errors import DeadlineError, OverloadedError, UnavailableError
from tests.distributed.serve.replicas.pair import Pair, request_of, run


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
        monkeypatch.setattr(pair.prefill._engine, "advance", lambda _: 1 / 0)
        for number in range(_MAX_FAILED):
            await pair.prefill.check_health()
            with pytest.raises(UnavailableError, match="ZeroDivisionError"):
                await pair.admitted(request_of(str(number)))
        with pytest.raises(UnavailableError, match=f"{_MAX_FAILED} steps failed"):
            await pair.prefill.check_health()
        await pair.check_idle()

    run(scenario())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_too_little_memory_says_which_options_help(stage, monkeypatch, error):
    def out_of_memory(*_):
        raise error

    async def scenario():
        pair = Pair(stage)
        monkeypatch.setattr(pair.decode._engine, "step", out_of_memory)
        request = request_of("large", max_tokens=50, ignore_eos=True)
        await pair.admitted(request)
        with pytest.raises((OverloadedError, UnavailableError)) as raised:
            await pair.rest(request)
        await pair.check_idle()
        return raised.value

    raised = run(scenario())
    if isinstance(raised, OverloadedError):  # Else the lease had ended before it was read.
        assert "lower max_num_seqs" in str(raised)
    assert isinstance(failure_of(error, "decode"), OverloadedError)


def test_errors_of_ours_stay_as_they_are():
    error = DeadlineError("too late")
    assert failure_of(error, "decode") is error
