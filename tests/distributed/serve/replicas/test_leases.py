"""The leases of a decode server: who holds a slot, for how long, and what ends it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from rayapp.distributed.serve.messages import Address, Handover, MisdirectedError, Refusal
from rayapp.errors import DeadlineError, UnavailableError, WireError
from tests.distributed.serve.replicas.pair import (
    Pair,
    expected_tokens,
    prompt_of,
    request_of,
    run,
)


def test_many_at_once_equal_one_at_a_time(stage):
    requests = [request_of(f"r{n}", max_tokens=8 + n, temperature=0.8, seed=n) for n in range(6)]

    async def scenario():
        pair = Pair(stage)

        async def answer(request):
            first, _ = await pair.admitted(request)
            return [*first.firsts[0].token_ids, *await pair.rest(request)]

        answers = await asyncio.gather(*map(answer, requests))
        await pair.check_idle()
        return answers

    assert run(scenario()) == [expected_tokens(stage, request) for request in requests]


def test_a_later_attempt_replays_what_is_out(stage):
    request = request_of("again", max_tokens=20, temperature=0.9, seed=4)
    whole = expected_tokens(stage, request)

    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        await pair.admitted(request)
        later = replace(request, attempt=1)
        await pair.admitted(later, sent={"again": whole[:9]})  # the only slot changes hands
        tokens = await pair.rest(later)
        with pytest.raises(UnavailableError):
            await pair.rest(request)
        await pair.check_idle()
        return tokens

    assert run(scenario()) == whole[9:]


def test_a_lease_that_nobody_reads_ends(stage):
    async def scenario():
        pair = Pair(stage, lease_s=0.5)
        request = request_of("unread", max_tokens=200, ignore_eos=True)
        await pair.admitted(request)
        assert (await pair.decode.check_integrity())["leases"] == 1
        await asyncio.sleep(0.6)
        with pytest.raises(UnavailableError, match="holds no slot"):
            await pair.rest(request)
        await pair.check_idle()

    run(scenario())


def test_an_answer_has_a_deadline(stage):
    async def scenario():
        pair = Pair(stage, decode_s=0.05)
        request = request_of("slow", max_tokens=200, ignore_eos=True)

        async def answered():
            await pair.admitted(request)
            return await pair.rest(request)

        with pytest.raises(DeadlineError, match="did not finish"):
            await answered()
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
        pair = Pair(stage, max_num_seqs=2, lease_s=0.5)
        for number in range(25):
            request = request_of(f"c{number}", max_tokens=100, ignore_eos=True)
            task = asyncio.ensure_future(pair.admitted(request))
            await asyncio.sleep(0.0015 * number)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await pair.check_idle()
        request = request_of("fine")
        first, _ = await pair.admitted(request)
        assert [*first.firsts[0].token_ids, *await pair.rest(request)] == expected_tokens(
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
        fetch = pair.decode._admissions._fetch

        async def slowly(handle):
            await (asyncio.sleep(0) if copying else fetched.wait())
            return await fetch(handle)

        pair.decode._admissions._fetch = slowly
        admission = asyncio.ensure_future(pair.admitted(request))
        while not pair.decode._slots.num_held:
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
        answer = [*first.firsts[0].token_ids, *await pair.rest(again)]
        assert answer == expected_tokens(stage, again)
        await pair.check_idle()

    run(scenario())


def test_an_attempt_cancelled_while_it_waits_for_a_slot_gets_none(stage):
    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        await pair.admitted(request_of("holder", max_tokens=200, ignore_eos=True))
        waiter = asyncio.ensure_future(pair.admitted(request_of("waiter")))
        while not pair.decode.num_waiting:
            await asyncio.sleep(0.001)
        await pair.decode.cancel("waiter", 0)
        await pair.decode.cancel("holder", 0)
        with pytest.raises(UnavailableError, match="was cancelled before it came"):
            await waiter
        await pair.check_idle()

    run(scenario())


def test_only_the_latest_cancellations_are_remembered(stage, monkeypatch):
    monkeypatch.setattr("rayapp.distributed.serve.replicas.admission.leases._MAX_CANCELLED", 2)

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


def test_kv_of_another_request_is_refused_and_its_slot_freed(stage):
    async def scenario():
        pair = Pair(stage)
        async with pair.prefilled(request_of("mine")) as (_, handle):
            handover = Handover(prompt_of(request_of("other")), pair.versions, ((),), 5.0)
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
        items = pair.prefill.prefill(prompt_of(request_of("old")), pair.versions, 5.0)
        assert isinstance(await anext(items), Refusal)
        with pytest.raises(StopAsyncIteration):
            await anext(items)
        handover = Handover(prompt_of(request_of("old")), pair.versions, ((),), 5.0)
        refusal = await pair.decode.admit(handover, [None])
        assert f"runs {ours}, the request needs {pair.versions}" in refusal.reason
        assert "in float32" in str(ours)
        await pair.check_idle()

    run(scenario())


def test_a_call_for_a_replica_that_has_gone_is_refused(stage):
    async def scenario():
        pair = Pair(stage)
        with pytest.raises(MisdirectedError, match="elsewhere is gone"):
            await pair.decode.follow("r", 0, Address("elsewhere"))
        with pytest.raises(MisdirectedError, match="elsewhere is gone"):
            await anext(pair.decode.deliver(Address("elsewhere")))

    run(scenario())


def test_a_failed_step_ends_its_requests_not_the_replica(stage, monkeypatch):
    async def scenario():
        pair = Pair(stage)
        request = request_of("unlucky", max_tokens=50, ignore_eos=True)
        step = pair.decode.engine.step

        def broken():
            raise RuntimeError("a kernel failed")

        monkeypatch.setattr(pair.decode.engine, "step", broken)
        await pair.admitted(request)
        with pytest.raises(UnavailableError, match=r"a kernel failed|holds no slot"):
            await pair.rest(request)
        monkeypatch.setattr(pair.decode.engine, "step", step)
        await pair.check_idle()
        lucky = request_of("lucky")
        first, _ = await pair.admitted(lucky)
        assert [*first.firsts[0].token_ids, *await pair.rest(lucky)] == expected_tokens(
            stage, lucky
        )
        await pair.check_idle()

    run(scenario())
