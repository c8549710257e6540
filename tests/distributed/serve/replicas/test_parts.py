"""KV in parts between a prefill and a decode server: the same answers, and nothing is left over."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import reduce
from operator import add

import pytest

from rayapp.distributed.serve.messages import KVPart, PrefillAnswer
from rayapp.distributed.serve.replicas import part_sizes
from rayapp.distributed.serve.replicas.part_sizes import PartSizes, PassProgress
from rayapp.engine.request import GenerationRequest
from rayapp.errors import DeadlineError, TransferError, UnavailableError, WireError
from rayapp.kv.ledger import KVShape, payload_bytes
from rayapp.plan import KVTransfer, PruningPlan
from tests.distributed.serve.replicas.pair import (
    PROMPT,
    Pair,
    expected_tokens,
    prompt_of,
    request_of,
    run,
)

LONG = PROMPT * 5


def long_request(name, **options) -> GenerationRequest:
    return replace(request_of(name, **options), prompt_token_ids=LONG)


@pytest.fixture(params=["dense", "encoded", "first and last", "decode first"])
def planned(request, stage):
    """The stage under a plan that cuts or encodes KV."""
    blocks = range(stage.loaded.signature.num_blocks)
    rules = {
        "encoded": {b: KVTransfer(encoding="int8") for b in blocks},
        "first and last": {0: KVTransfer(first=70, last=20, encoding="int4")},
    }.get(request.param, {})
    first = "decode" if request.param == "decode first" else "prefill"
    plan = PruningPlan(model=stage.loaded.signature, kv_transfer=rules, first_token=first)
    return replace(stage, plan=plan)


@pytest.fixture
def looking(monkeypatch):
    """``looking(pair)``: the engine lets the event loop run between any two blocks.

    A pass of a tiny model is over before anybody could have looked at its blocks.
    """

    def look(pair):
        advance = pair.prefill.engine.advance
        loop = asyncio.get_running_loop()

        def slowly(chunks, noted=None):
            def note():
                noted()
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0.03), loop).result(10)

            return advance(chunks, noted and note)

        monkeypatch.setattr(pair.prefill.engine, "advance", slowly)

    return look


@pytest.mark.parametrize("chunk", [40, 1000])
def test_answers_are_those_of_kv_that_is_sent_whole(planned, looking, chunk):
    """In several chunks, and in groups of blocks of one chunk."""

    async def scenario():
        pair = Pair(planned, in_parts=True, max_num_batched_tokens=chunk)
        looking(pair)
        asked = long_request("parts")
        async with pair.begun(asked) as parted:
            await parted.reserve()
            await parted.parts()
            assert parted.num_parts >= 1
            await parted.end()
            firsts = [token for first in parted.item.firsts for token in first.token_ids]
        tokens = [*firsts, *await pair.rest(asked)]
        await pair.check_idle()
        sizes = reduce(add, (copied.sizes for copied in parted.copied))
        return tokens, sizes

    tokens, sizes = run(scenario())
    assert tokens == expected_tokens(planned, long_request("parts"))
    shape = KVShape.of_config(planned.loaded.model.config, planned.loaded.model.dtype)
    assert sizes.payload_bytes == payload_bytes(shape, planned.plan, len(LONG))


@pytest.mark.parametrize("chunk", [64, 1000])
def test_several_answers_share_parts_and_later_ones_begin_from_a_copy(stage, looking, chunk):
    requests = [long_request(f"n{seed}", temperature=1.0, seed=seed) for seed in range(4)]

    async def scenario():
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=chunk, max_num_seqs=2)
        looking(pair)
        async with pair.begun(*requests) as parted:
            await parted.reserve()
            await parted.parts()
            await parted.end()
            firsts = {first.request_id: list(first.token_ids) for first in parted.item.firsts}
        tokens = await pair.rest(*requests)
        await pair.check_idle()
        return {name: firsts[name] + tokens[name] for name in tokens}

    answers = run(scenario())
    for request in requests:
        assert answers[request.request_id] == expected_tokens(stage, request)


def test_answers_that_end_with_their_first_token_give_their_slots_back(stage):
    ends = replace(long_request("ends"), sampling=request_of("x", max_tokens=1).sampling)
    goes_on = long_request("goes on")

    async def scenario(*requests):
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=64, max_num_seqs=2)
        async with pair.begun(*requests) as parted:
            await parted.reserve()
            assert (await pair.decode.check_integrity())["slots"] == 2
            await parted.parts()
            await parted.end()
            assert (await pair.decode.check_integrity())["slots"] == 1
            first = next(f for f in parted.item.firsts if f.request_id == "goes on")
        tokens = [*first.token_ids, *await pair.rest(goes_on)]
        await pair.check_idle()
        return tokens

    assert run(scenario(goes_on, ends)) == expected_tokens(stage, goes_on)


def test_prompts_that_no_answer_goes_on_from_are_not_cut(stage):
    only = replace(long_request("one"), sampling=request_of("x", max_tokens=1).sampling)

    async def scenario():
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=40)
        items = [item async for item in pair.prefill.prefill(prompt_of(only), pair.versions, 5.0)]
        assert [type(item) for item in items] == [PrefillAnswer]
        await pair.check_idle()

    run(scenario())


@pytest.mark.parametrize("point", ["reserved", "first part", "last part", "ended", "copying"])
def test_leaving_at_any_point_gives_everything_back(stage, held, point):
    async def scenario():
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=40, max_num_seqs=1)
        async with pair.begun(long_request("left")) as parted:
            await parted.reserve()
            if point == "first part":
                await parted.part()
            if point in ("last part", "ended"):
                await parted.parts()
            if point == "ended":
                await parted.end()
            if point == "copying":
                release = held(pair.decode._unpacking)
                copying = asyncio.ensure_future(parted.part())
                await asyncio.sleep(0.05)
            await pair.decode.cancel("left", 0)
            if point == "copying":
                await asyncio.sleep(0.05)
                release.set()
                with pytest.raises(UnavailableError, match="was cancelled"):
                    await copying
            elif isinstance(parted.item, KVPart):
                with pytest.raises(UnavailableError, match="holds no slot here"):
                    await parted.part()
        await pair.check_idle()
        asked = request_of("next")
        firsts = await pair.handed_over(asked)
        assert [*firsts, *await pair.rest(asked)] == expected_tokens(stage, asked)
        await pair.check_idle()

    run(scenario())


def test_a_part_of_another_number_or_twice_is_refused_and_ends_nothing_else(stage):
    async def scenario():
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=40, max_num_seqs=2)
        async with pair.begun(long_request("mine")) as parted:
            await parted.reserve()
            with pytest.raises(TransferError, match=r"part 1 of the KV .* expected part 0"):
                await parted.part(1)
        await pair.decode.cancel("mine", 0)
        await pair.check_idle()

    run(scenario())


def test_a_message_of_another_part_or_attempt_is_never_decoded(stage):
    async def scenario():
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=40, max_num_seqs=3)
        later = replace(long_request("mine"), attempt=1)
        async with pair.begun(long_request("mine")) as first, pair.begun(later) as second:
            await first.reserve()
            await second.reserve()  # The later attempt replaces the earlier one.
            with pytest.raises(UnavailableError, match="holds no slot"):
                await first.part()
            await first.stream.item()
            handle = await pair.channel.part(first.stream)
            with pytest.raises(WireError, match="attempt"):
                await pair.decode.load("mine", 1, 0, [handle])
            with pytest.raises(UnavailableError, match="holds no slot"):
                await second.part()  # Its own lease ended with the wrong message.
        await pair.check_idle()

    run(scenario())


def test_a_seat_that_nobody_fills_is_given_back(stage):
    async def scenario():
        limits = {"queue_s": 0.2, "prefill_s": 0.2, "transfer_s": 0.2}
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=40, max_num_seqs=1, **limits)
        async with pair.begun(long_request("orphan")) as parted:
            await parted.reserve()
            with pytest.raises(DeadlineError, match="no decode slot"):
                await pair.handed_over(request_of("waits"), wait_s=0.01)
            await asyncio.sleep(0.6)
            await pair.check_idle()

    run(scenario())


@pytest.mark.parametrize("fault", ["twice", "late", "missing", "another attempt"])
def test_groups_of_blocks_that_do_not_follow_one_another_are_never_decoded(stage, looking, fault):
    """Whoever delivers them: the lease ends with the fault, and its pages are as good as new."""

    async def scenario():
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=1000, max_num_seqs=2)
        looking(pair)
        load, channel = pair.decode.load, pair.channel
        async with pair.begun(long_request("mine")) as parted:
            await parted.reserve()
            first = await channel.part(parted.stream)
            if fault != "missing":
                await load("mine", 0, 0, [first])
            assert isinstance(await parted.stream.item(), KVPart)  # There is a second group.
            message = first if fault == "twice" else await channel.part(parted.stream)
            number = {"twice": 0, "late": 2}.get(fault, 1)
            attempt = 1 if fault == "another attempt" else 0
            with pytest.raises((TransferError, UnavailableError)):
                await load("mine", attempt, number, [message])
        await pair.decode.cancel("mine", 0)
        await pair.check_idle()
        asked = long_request("next")
        firsts = await pair.handed_over(asked)
        assert [*firsts, *await pair.rest(asked)] == expected_tokens(stage, asked)
        await pair.check_idle()

    run(scenario())


def test_short_prompts_go_whole_whatever_else_leaves_in_parts(stage, looking):
    """A part must be worth its calls, and nobody even notes the blocks of a prompt that is not."""

    async def scenario():
        pair = Pair(stage, in_parts=True, max_num_batched_tokens=1000)
        pair.prefill.queue._parts = PartSizes(cost_s=0.005)  # 5 MB at first, far more than this.
        noted = []
        advance = pair.prefill.engine.advance
        pair.prefill.engine.advance = lambda chunks, **note: noted.append(note) or advance(chunks)
        async with pair.begun(long_request("whole")) as parted:
            assert isinstance(parted.item, PrefillAnswer)
        assert noted == [{}]

    run(scenario())


def test_a_part_leaves_only_if_its_calls_are_over_before_the_prompt(monkeypatch):
    sizes = PartSizes(cost_s=0.01)
    assert not sizes.is_in_time(0.019)
    assert sizes.is_in_time(0.021)
    assert PartSizes(0).is_in_time(0.0)


@pytest.mark.parametrize("rate", [1e5, 1e7, 1e9])
def test_no_part_is_so_small_that_ray_would_carry_it_inside_a_message(rate):
    """Encoded as int4 it weighs a quarter, and Ray keeps less than 100 kB out of its store."""
    sizes = PartSizes(cost_s=0.005)
    sizes.handed_over(1 / rate)
    prompts = [2**n for n in range(40)]
    in_parts = [least for n in prompts if (least := sizes.least_bytes(n)) < n]
    assert min(in_parts) > 4 * 100_000
    assert in_parts == sorted(in_parts)
    assert PartSizes(0).least_bytes(10**8) == 0


def test_the_time_that_a_pass_has_left_follows_from_its_blocks(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(part_sizes.time, "monotonic", lambda: now[0])
    progress = PassProgress(num_tokens=50, num_blocks=10)
    progress.begin()
    assert progress.left_s == progress.token_s == 0.0  # Nothing is known yet.
    for _ in range(4):
        now[0] += 2.0
        progress.note()
    assert progress.left_s == pytest.approx(6 * 2.0)
    assert progress.token_s == pytest.approx(10 * 2.0 / 50)
    now[0] += 3.0
    assert progress.left_s == pytest.approx(6 * 2.0 - 3.0)
    now[0] += 50.0
    assert progress.left_s == 0.0
    progress.end()
    assert progress.left_s == 0.0
    assert progress.token_s == pytest.approx(61.0 / 50)


def test_parts_balance_their_calls_against_what_is_left_at_the_end():
    sizes = PartSizes(cost_s=0.01)
    for _ in range(100):
        sizes.packed(2_000_000, 0.001)  # 2 GB/s
    assert sizes.least_bytes(125_000_000) == pytest.approx(50_000_000, rel=0.01)
    assert sizes.least_bytes(80_000_000) == pytest.approx(40_000_000, rel=0.01)
    for num_bytes in (5_000_000, 70_000_000):
        assert sizes.least_bytes(num_bytes) == num_bytes, (
            "parts save less than a call: it goes whole"
        )
    sizes.handed_over(0.0)  # Nobody knows.
    assert sizes.least_bytes(80_000_000) == pytest.approx(40_000_000, rel=0.01)
    sizes.handed_over(1 / 500e6)  # The way is slower than packing.
    assert sizes.least_bytes(80_000_000) == pytest.approx(20_000_000, rel=0.01)
    assert PartSizes(0).least_bytes(80_000_000) == 0
