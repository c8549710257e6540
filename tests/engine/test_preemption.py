"""Running out of pages: who waits, who comes back, and that no token changes by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.engine.sequences.memory import KVMemory
from rayapp.engine.sequences.running import AnswerStart
from rayapp.errors import InputError, OverloadedError, TransferError
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

MAX_LEN = 48
CUTS = {
    0: {"first": 2, "last": 4},
    2: {"first": 0.25, "last": 0.25},
    3: {"first": 0.25, "last": 0.25},
}


class Paged:
    """Engines over few pages, each free page poisoned, and the answers that came."""

    def __init__(self, model, plan=None, *, num_bytes=None, block_size=4, max_num_seqs=6, **memory):
        self.plan = plan or PruningPlan()
        limits = {"max_model_len": MAX_LEN, "eos_token_ids": ()}
        self.prefill = PrefillEngine(BlockStack(model, self.plan, "prefill"), self.plan, **limits)
        self.decode = DecodeEngine(
            BlockStack(model, self.plan, "decode"),
            self.plan,
            max_num_seqs=max_num_seqs,
            memory=KVMemory(num_bytes, block_size, **memory),
            **limits,
        )
        for arena in self.decode.pages.arenas:
            arena.keys_HED.fill_(torch.nan)
            arena.values_HED.fill_(torch.nan)
        self.answers: dict[str, list[int]] = {}
        self.most_aside = 0

    @property
    def longest_bytes(self) -> int:
        pages = self.decode.pages
        return pages._longest * pages._page_bytes

    def start(self, *requests: GenerationRequest) -> None:
        """Prefill once and admit an answer for every request."""
        output = self.prefill.run(requests[0])
        sent = {r.request_id: tuple(self.answers.get(r.request_id, ())) for r in requests}
        first = output.first.token_ids if output.first else ()
        starts = [AnswerStart(r, replay=sent[r.request_id] or first) for r in requests]
        self.decode.admit_answers(starts, output.segment)
        for start in starts:
            self.answers[start.request.request_id] = list(start.sent)

    def step(self) -> None:
        for batch in self.decode.step():
            self.answers[batch.request_id].extend(batch.token_ids)
        self.most_aside = max(self.most_aside, self.decode.num_aside)
        self.decode.check_integrity()

    def drain(self) -> None:
        while self.decode.num_running:
            self.step()
        assert self.decode.usage == 0.0


def request(name, length, num_tokens, **sampling) -> GenerationRequest:
    generator = torch.Generator().manual_seed(length)
    prompt = tuple(torch.randint(0, 250, (length,), generator=generator).tolist())
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **sampling)
    return GenerationRequest(name, prompt, params)


def alone(model, plan, asked: GenerationRequest) -> list[int]:
    """The answer of one request that has an engine to itself."""
    paged = Paged(model, plan, max_num_seqs=1, block_size=16)
    paged.start(asked)
    paged.drain()
    return paged.answers[asked.request_id]


@pytest.fixture(scope="module")
def plans(make_plan):
    """The empty plan, and one with groups that are cut and grow differently."""
    return lambda model, is_cut: make_plan(model, kv_transfer=CUTS) if is_cut else PruningPlan()


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sequences_that_outgrow_the_pages_take_turns(tiny_model, plans, family, is_cut):
    model = tiny_model(family)
    plan = plans(model, is_cut)
    room = Paged(model, plan).longest_bytes
    paged = Paged(model, plan, num_bytes=room * 5 // 4, aside_bytes=1 << 30)
    asked = [request(f"r{i}", 5 + 3 * i, 30) for i in range(4)]
    waiting = list(asked)
    while waiting or paged.decode.num_running:
        try:
            while waiting:
                paged.start(waiting[0])
                del waiting[0]
        except OverloadedError:
            assert paged.decode.num_running
        paged.step()
    assert paged.most_aside or family == "mistral"
    assert paged.decode.take_preempted() == []
    for each in asked:
        assert paged.answers[each.request_id] == alone(model, plan, each)


def test_without_host_memory_the_youngest_leaves_and_goes_on_elsewhere(tiny_model):
    model = tiny_model("llama")
    paged = Paged(model, num_bytes=Paged(model).longest_bytes, aside_bytes=0)
    asked = [request(f"r{i}", 7, 30) for i in range(3)]
    for each in asked:
        paged.start(each)
    preempted = []
    while paged.decode.num_running:
        paged.step()
        preempted += paged.decode.take_preempted()
    assert [each.request_id for each in preempted] == ["r2", "r1"]
    for each in preempted:
        paged.start(replace(each, attempt=1))
        paged.drain()
    expected = alone(model, None, asked[0])
    assert all(answer == expected for answer in paged.answers.values())


def test_new_ones_are_refused_while_somebody_waits_for_room(tiny_model):
    model = tiny_model("llama")
    paged = Paged(model, num_bytes=Paged(model).longest_bytes, aside_bytes=1 << 30)
    for i in range(3):
        paged.start(request(f"r{i}", 7, 38))
    while not paged.decode.num_aside:
        paged.step()
    with pytest.raises(OverloadedError, match="wait for room"):
        paged.start(request("new", 1, 2))
    assert paged.decode.cancel("r2")
    assert not paged.decode.cancel("r2")
    paged.drain()


def test_memory_for_less_than_one_sequence_is_refused(tiny_model):
    model = tiny_model("llama")
    room = Paged(model).longest_bytes
    assert Paged(model, num_bytes=room).decode.num_kv_tokens == MAX_LEN
    with pytest.raises(InputError, match=r"cannot hold one sequence of 48 tokens.* 1 more; raise"):
        Paged(model, num_bytes=room - 1)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_answers_to_one_prompt_share_its_pages(
    tiny_model, make_plan, monkeypatch, share, first_token
):
    monkeypatch.setattr("rayapp.engine.sequences.group.SHARED_BYTES", 1 if share else 1 << 30)
    model = tiny_model("qwen2")
    plan = make_plan(model, kv_transfer=CUTS, first_token=first_token)
    paged = Paged(model, plan, max_num_seqs=5, num_bytes=1 << 20)
    asked = [request(f"a{i}", 21, 9 + i, temperature=0.9, seed=i) for i in range(3)]
    paged.start(request("other", 9, 12))
    paged.step()
    paged.start(*asked)
    held = [sequence.kv[-1] for sequence in paged.decode.running[1:]]
    assert len({id(entries.prompt) for entries in held if entries.prompt}) == share
    assert paged.decode.cancel("a1")
    paged.drain()
    first = len(paged.answers["a0"]) > 0 and first_token == "prefill"
    for each in (asked[0], asked[2]):
        among = paged.answers[each.request_id]
        single = Paged(model, plan)
        single.answers[each.request_id] = among[:1] if first else []
        single.start(each)
        single.drain()
        assert among == single.answers[each.request_id]


def test_shared_pages_go_to_host_memory_and_come_back(tiny_model, monkeypatch):
    monkeypatch.setattr("rayapp.engine.sequences.group.SHARED_BYTES", 1)
    model = tiny_model("llama")
    paged = Paged(model, num_bytes=Paged(model).longest_bytes, aside_bytes=1 << 30)
    asked = [request(f"a{i}", 20, 28) for i in range(3)]
    paged.start(*asked)
    paged.drain()
    assert paged.most_aside
    expected = alone(model, None, asked[0])
    assert all(answer == expected for answer in paged.answers.values())


def test_a_reservation_waits_unmoved_and_a_later_attempt_wins(tiny_model):
    model = tiny_model("llama")
    paged = Paged(model, num_bytes=2 * Paged(model).longest_bytes)
    paged.start(request("a", 10, 20))
    asked = request("b", 12, 12)
    output = paged.prefill.run(asked)
    start = AnswerStart(asked, output.first)
    held = paged.decode.reserve([asked], output.segment.extent)
    for _ in range(3):
        paged.step()
    held.load(output.segment)
    paged.decode.commit(held, [start])
    paged.answers["b"] = list(output.first.token_ids)
    paged.drain()
    assert paged.answers["b"] == alone(model, None, asked)
    early = paged.decode.reserve([asked], output.segment.extent)
    late = AnswerStart(replace(asked, attempt=1), output.first)
    paged.decode.admit_answers([late], output.segment)
    early.load(output.segment)
    with pytest.raises(TransferError, match="attempt 1 is running, attempt 0 came late"):
        paged.decode.commit(early, [start])
    paged.decode.release(early)
    paged.decode.cancel("b")
    paged.decode.check_integrity()
    assert paged.decode.num_free == 6


@pytest.fixture(scope="module")
def reference_answers():
    """Answers of single requests by family, plan and request, computed once."""
    return {}


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_random_schedules_give_the_answers_of_single_requests(
    tiny_model, plans, reference_answers, data
):
    family, is_cut = data.draw(st.sampled_from(["llama", "mistral"])), data.draw(st.booleans())
    model = tiny_model(family)
    plan = plans(model, is_cut)
    block_size = data.draw(st.sampled_from([1, 3, 8]))
    room = Paged(model, plan, block_size=block_size).longest_bytes
    num_bytes = int(room * data.draw(st.sampled_from([1.0, 1.5, 3.0])))
    paged = Paged(model, plan, num_bytes=num_bytes, block_size=block_size, aside_bytes=1 << 30)
    asked: dict[str, GenerationRequest] = {}
    for number in range(data.draw(st.integers(2, 6))):
        length, num_tokens = data.draw(st.integers(1, 24)), data.draw(st.sampled_from([4, 24]))
        count = data.draw(st.sampled_from([1, 1, 3]))
        same = [request(f"r{number}-{i}", length, num_tokens) for i in range(count)]
        try:
            paged.start(*same)
            asked |= {each.request_id: each for each in same}
        except OverloadedError:
            paged.step()
        for _ in range(data.draw(st.integers(0, 5))):
            paged.step()
        if asked and data.draw(st.integers(0, 3)) == 0:
            name = data.draw(st.sampled_from(sorted(asked)))
            paged.decode.cancel(name)
            del asked[name]
            paged.decode.check_integrity()
    paged.drain()
    for name, each in asked.items():
        key = (family, is_cut, each.prompt_token_ids, each.sampling.max_tokens)
        if key not in reference_answers:
            reference_answers[key] = alone(model, plan, each)
        assert paged.answers[name] == reference_answers[key]
