"""KV that is read straight into pages is the KV that was sent, or is never decoded.

The oracle is decode from a segment that lies in memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rayapp.engine.request import GenerationRequest
from rayapp.engine.sequences.running import AnswerStart, Reservation
from rayapp.errors import WireError
from rayapp.kv.landing import land
from rayapp.kv.pieces import Arrival, Message
from rayapp.kv.wire import Envelope, extent_of, pack, unpack
from tests.contracts.registered import RegisteredArrival, RegisteredChannel, RegisteredHandle
from tests.engine.test_prefill_parts import LIMIT, PLANS, SENT, Collected, requests_of, run_all

Make = Callable[..., Any]
WAYS = ("pieces", "one row", "registered")


@pytest.fixture(autouse=True)
def released() -> Any:
    yield
    RegisteredChannel.close()


def arrived(message: Message, way: str) -> Arrival:
    """A message as it looks to its receiver."""
    if way == "registered":
        return RegisteredArrival(RegisteredHandle(RegisteredChannel.publish(message)))
    return message.owned() if way == "one row" else message


def poison(both: Any) -> None:
    """Free pages hold what nobody may ever read."""
    for arena in both.decode.pages.arenas:
        arena.keys_HED.fill_(torch.nan)
        arena.values_HED.fill_(torch.nan)


def decoded(
    both: Any, asked: GenerationRequest, answers: Sequence[GenerationRequest], load: Any
) -> dict[str, list[int]]:
    """The answers to a prompt whose KV ``load`` brings into a reservation."""
    output = both.prefill.run(asked)
    poison(both)
    reservation = both.decode.reserve(answers, output.segment.extent)
    load(reservation, output)
    both.answers = {answer.request_id: list(output.first.token_ids) for answer in answers}
    first = output.first
    both.decode.commit(
        reservation,
        [AnswerStart(a, replace(first, request_id=a.request_id)) for a in answers],
    )
    both.drain()
    return both.answers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_lands_in_pages_is_what_was_sent(
    family: str, plan: str, way: str, tiny_model: Make, engines: Make, make_plan: Make
) -> None:
    model = tiny_model(family)
    both = engines(model, make_plan(model, **PLANS[plan]), max_model_len=LIMIT)

    def copied(reservation: Reservation, output: Any) -> None:
        reservation.load(unpack(pack(output.segment, SENT), SENT))

    def landed(reservation: Reservation, output: Any) -> None:
        arrival = arrived(pack(output.segment, SENT), way)
        assert extent_of(arrival, SENT) == output.segment.extent
        segment = land(arrival, SENT, reservation)
        in_pages = [entry for entry in segment.blocks if entry.encoding == "model"]
        for entry in in_pages:
            place = reservation.place(entry.block, entry.num_entries)
            assert place is not None
            assert entry.keys_HND.data_ptr() == place[0].data_ptr()
            assert entry.values_HND.data_ptr() == place[1].data_ptr()
        assert in_pages or plan == "int8" or "int4" in plan
        reservation.load(segment)

    for asked in requests_of():
        wanted = decoded(both, asked, [asked], copied)
        assert decoded(both, asked, [asked], landed) == wanted


@pytest.mark.parametrize("shares", [True, False])
def test_several_answers_have_what_landed(shares: bool, tiny_model: Make, engines: Make) -> None:
    both = engines(tiny_model("llama"), max_model_len=LIMIT)
    for group in both.decode.pages.groups:
        group.shares_from = 1 if shares else None
    (asked, *_) = requests_of()
    answers = [replace(asked, request_id=f"answer {n}") for n in range(3)]

    def landed(reservation: Reservation, output: Any) -> None:
        reservation.load(land(pack(output.segment, SENT), SENT, reservation))

    def copied(reservation: Reservation, output: Any) -> None:
        reservation.load(output.segment)

    wanted = decoded(both, asked, answers, copied)
    assert decoded(both, asked, answers, landed) == wanted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", ["dense", "ends", "int4 and ends"])
def test_parts_land_one_behind_the_other(
    plan: str, way: str, tiny_model: Make, engines: Make, make_plan: Make
) -> None:
    model = tiny_model("llama")
    both = engines(model, make_plan(model, **PLANS[plan]), max_model_len=LIMIT)
    (asked, *_) = requests_of()

    def copied(reservation: Reservation, output: Any) -> None:
        reservation.load(unpack(pack(output.segment, SENT), SENT))

    wanted = decoded(both, asked, [asked], copied)

    def landed(reservation: Reservation, _: Any) -> None:
        runs = [both.prefill.begin(asked, in_parts=True)]
        collected = Collected(runs, 1)
        (output,) = run_all(both.prefill, runs, LIMIT, collected.look)
        (messages,) = collected.messages
        last = replace(SENT, part=len(messages))
        sent = [(m, replace(SENT, part=n, is_last=False)) for n, m in enumerate(messages)]
        for message, envelope in (*sent, (pack(output.segment, last), last)):
            reservation.load(land(arrived(message, way), envelope, reservation))

    assert decoded(both, asked, [asked], landed) == wanted


@pytest.mark.parametrize("way", ["one row", "registered"])
def test_a_damaged_message_is_never_decoded(way: str, tiny_model: Make, engines: Make) -> None:
    both = engines(tiny_model("mistral"), max_model_len=LIMIT)
    asked = requests_of()[1]
    output = both.prefill.run(asked)
    whole = pack(output.segment, SENT).flat()
    rng = np.random.default_rng(0)
    for at in (0, 9, 13, 20, 57, 70, *rng.integers(64, len(whole), 40)):
        reservation = both.decode.reserve([asked], output.segment.extent)
        damaged = whole.copy()
        damaged[at] ^= 1 << rng.integers(8)
        with pytest.raises(WireError, match=r"prefill again|release of rayapp"):
            reservation.load(land(arrived(Message((damaged,)), way), SENT, reservation))
        with pytest.raises(WireError, match="have not come"):
            both.decode.commit(reservation, [AnswerStart(asked, output.first)])
        both.decode.release(reservation)
        assert not both.decode.num_running
        both.decode.check_integrity()
    both.start(asked)  # The pages are as good as new.
    both.drain()


def test_more_entries_than_the_plan_sends_find_no_page(
    tiny_model: Make, engines: Make, make_plan: Make
) -> None:
    """A message of another plan, under a true checksum, writes to no page of anybody."""
    model = tiny_model("llama")
    both = engines(model, make_plan(model, **PLANS["ends"]), max_model_len=LIMIT)
    (asked, *_) = requests_of()
    dense = engines(model, max_model_len=LIMIT).prefill.run(asked).segment
    reservation = both.decode.reserve([asked], dense.extent)
    poison(both)
    assert reservation.place(99, 1) is None
    assert reservation.place(0, 151) is None
    segment = land(pack(dense, SENT), SENT, reservation)
    with pytest.raises(WireError, match="prefill again"):
        reservation.load(segment)
    for block in PLANS["ends"]["kv_transfer"]:
        views = both.decode.pages.landing_place(
            reservation.held, dense.extent, both.decode.pages.nothing_loaded(), block, 4
        )
        assert views is not None
        assert all(view.isnan().all() for view in views)
    both.decode.release(reservation)


def test_another_envelope_is_refused_before_anything_is_read(
    tiny_model: Make, engines: Make
) -> None:
    both = engines(tiny_model("llama"), max_model_len=LIMIT)
    (asked, *_) = requests_of()
    output = both.prefill.run(asked)
    reservation = both.decode.reserve([asked], output.segment.extent)
    poison(both)
    stale = pack(output.segment, Envelope("r", 1, "", ""))
    with pytest.raises(WireError, match="expected"):
        land(stale, SENT, reservation)
    views = reservation.place(0, 4)
    assert views is not None
    assert all(view.isnan().all() for view in views)
    both.decode.release(reservation)


def test_what_is_no_row_of_bytes_is_refused(tiny_model: Make, engines: Make) -> None:
    both = engines(tiny_model("llama"), max_model_len=LIMIT)
    (asked, *_) = requests_of()
    output = both.prefill.run(asked)
    whole = pack(output.segment, SENT).flat()
    reservation = both.decode.reserve([asked], output.segment.extent)
    for pieces in ((), (whole.astype(np.int16),), (whole[:100],), (bytes(whole),)):
        for read in (extent_of, land):
            with pytest.raises(WireError):
                read(Message(pieces), SENT)
    both.decode.release(reservation)
