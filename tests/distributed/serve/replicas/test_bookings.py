"""Room that decode promises before a prompt is prefilled: to how many, in what order, how long."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rayapp.distributed.serve.messages import Address, Reader, Refusal, Seat
from rayapp.distributed.serve.replicas.admission.forecast import Room
from rayapp.errors import DeadlineError, UnavailableError
from tests.distributed.serve.replicas.pair import (
    Pair,
    expected_tokens,
    prompt_of,
    request_of,
    run,
)
from tests.distributed.serve.replicas.test_pages import memory_of


def booked(pair, name, *, wait_s=60.0, attempt=0, reader=None, **sampling):
    """A task that books room for one answer."""
    request = replace(request_of(name, **sampling), attempt=attempt)
    address = Address(reader=reader or Reader(name))
    return asyncio.ensure_future(
        pair.decode.book(prompt_of(request), pair.versions, wait_s, address)
    )


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


def test_as_many_are_promised_room_as_will_have_left():
    full = Room(answers=4, pages=40, most_answers=4, most_pages=40, ending_per_s=2.0)
    assert not full.holds(0, 0, 10, lead_s=0.4)
    assert full.holds(0, 0, 10, lead_s=1.0)
    assert full.holds(1, 10, 10, lead_s=1.0)
    assert not full.holds(1, 10, 11, lead_s=1.0)  # pages of two answers are given back
    assert not full.holds(2, 0, 0, lead_s=1.0)  # and two slots
    assert not full.holds(4, 0, 0, lead_s=100.0)  # never more than run
    empty = Room(answers=0, pages=0, most_answers=4, most_pages=40, ending_per_s=0.0)
    assert empty.holds(0, 0, 1000, lead_s=0.0)  # alone, any answer fits that the engine takes
    assert not empty.holds(1, 30, 11, lead_s=0.0)


def test_room_is_promised_in_the_order_of_asking(stage):
    async def scenario():
        pair = Pair(stage, max_num_seqs=2)
        asked = [booked(pair, f"r{n}") for n in range(4)]
        await settled()
        assert [one.done() for one in asked] == [True, True, False, False]
        assert isinstance(asked[0].result(), Seat)
        assert pair.decode.num_waiting == 2
        assert (await pair.decode.check_integrity())["bookings"] == 2
        for ended, promised in (("r1", asked[2]), ("r0", asked[3])):
            await pair.decode.cancel(ended, 0)
            await settled()
            assert promised.done()
        for name in ("r2", "r3"):
            await pair.decode.cancel(name, 0)
        await pair.check_idle()

    run(scenario())


def test_a_booking_becomes_a_slot_with_the_kv(stage):
    request = request_of("booked", max_tokens=20)

    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        await booked(pair, "booked", max_tokens=20)
        other = booked(pair, "other")
        first, _ = await pair.admitted(request)
        counts = await pair.decode.check_integrity()
        assert (counts["bookings"], counts["leases"]) == (0, 1)
        assert not other.done()
        tokens = [*first.firsts[0].token_ids, *await pair.rest(request)]
        await other  # the slot is free again
        await pair.decode.cancel("other", 0)
        await pair.check_idle()
        return tokens

    assert run(scenario()) == expected_tokens(stage, request)


def test_pages_are_promised_by_forecast(stage):
    """Memory for one sequence of the longest length: two long answers are too many, short fit."""

    async def scenario():
        pair = Pair(stage, max_num_seqs=8, memory=memory_of(stage, 1))
        long = {"max_tokens": 120, "ignore_eos": True}
        asked = [booked(pair, f"long{n}", **long) for n in range(2)]
        await settled()
        assert [one.done() for one in asked] == [True, False]
        await pair.decode.cancel("long0", 0)
        await asked[1]
        await pair.decode.cancel("long1", 0)
        short = [booked(pair, f"short{n}", max_tokens=4, ignore_eos=True) for n in range(8)]
        await settled()
        assert sum(one.done() for one in short) == 256 // 48  # three pages of 16 tokens each
        for one in short:
            one.cancel()
        for number in range(8):
            await pair.decode.cancel(f"short{number}", 0)
        await pair.check_idle()

    run(scenario())


def test_answers_that_may_stop_are_taken_to_be_as_long_as_others_were(stage):
    pair = Pair(stage)
    pages = pair.decode._forecast.pages_of
    usual = pages(request_of("r", max_tokens=128, ignore_eos=True))
    assert pages(request_of("r", max_tokens=200)) == usual
    for _ in range(500):
        pair.decode._meter.end(16)
    short = pages(request_of("r", max_tokens=200))
    assert short == pages(request_of("r", max_tokens=17, ignore_eos=True)) < usual
    assert pages(request_of("r", max_tokens=200, min_tokens=128)) == usual


def test_what_ends_a_booking(stage):
    async def scenario():
        pair = Pair(stage, max_num_seqs=1, queue_s=0.1, prefill_s=0.1, transfer_s=0.1)
        await booked(pair, "late")
        with pytest.raises(DeadlineError, match="no room for the prompt's KV within"):
            await booked(pair, "waits", wait_s=0.05)
        await booked(pair, "next")  # once the KV of the first should have come long ago
        await pair.decode.cancel("next", 0)
        await pair.decode.cancel("overtaken", 1)
        with pytest.raises(UnavailableError, match="was cancelled before it came"):
            await booked(pair, "overtaken")
        await booked(pair, "overtaken", attempt=2)
        await pair.decode.cancel("overtaken", 1)  # of an earlier attempt
        assert (await pair.decode.check_integrity())["bookings"] == 1
        waiting = booked(pair, "leaves")
        await settled()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await pair.decode.cancel("overtaken", 2)
        await pair.check_idle()

    run(scenario())


def test_a_booking_ends_with_its_caller(stage):
    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        pair.decode._leases.callers._is_alive = lambda actor: actor != "dead"
        await booked(pair, "orphan", reader=Reader("r", "dead"))
        assert (await pair.decode.check_integrity())["bookings"] == 1
        await pair.check_idle()

    run(scenario())


def test_another_version_promises_nothing(stage):
    async def scenario():
        pair = Pair(stage)
        pair.versions = replace(pair.versions, plan_fingerprint="other")
        assert isinstance(await booked(pair, "old"), Refusal)
        await pair.check_idle()

    run(scenario())


def test_prompts_that_wait_for_prefill_are_no_work_of_decode(stage):
    """Booked prompts fill the slots while decode is idle; then an answer runs, and it is short."""

    async def scenario():
        pair = Pair(stage, max_num_seqs=1)
        long = {"max_tokens": 200, "ignore_eos": True}
        await booked(pair, "first", **long)
        waiting = booked(pair, "second")
        await settled()
        assert pair.decode.num_waiting == 1
        assert pair.decode.report.waiting == 0
        await pair.admitted(request_of("first", **long))
        assert pair.decode.report.waiting == 1
        for name in ("first", "second"):
            await pair.decode.cancel(name, 0)
        await asyncio.gather(waiting, return_exceptions=True)
        await pair.check_idle()

    run(scenario())
