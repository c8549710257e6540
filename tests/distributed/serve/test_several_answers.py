"""Requests with several answers, over HTTP on a real cluster: all answers come, and are right.

Serve gives everything that one HTTP request calls the same internal id, which no test in one
process can see. Every request here has a timeout, so that an answer that never comes is a failure.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import httpx
import pytest
from ray.serve.request_router import RequestRouter

from rayapp.api.openai.schema import CompletionRequest
from rayapp.distributed.serve.ingress.ingress import open_service
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest, SamplingParams
from rayapp.errors import DeadlineError
from tests.services import LEASE_S

pytestmark = pytest.mark.ray

MAX_TOKENS = 5
ANSWERED_WITHIN_S = 60.0
PROMPTS = ["What a day!", "a", "seven", "Of other answers", "x y", "(1, 2)", "no", "the eighth"]
GREEDY, SEEDED = {"temperature": 0}, {"temperature": 0.8, "seed": 11}


@dataclass
class Choices:
    """The reply that a client got: texts and finish reasons by index, and the counts."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: Any = None

    def add(self, body: dict[str, Any], text_of: Callable[[dict[str, Any]], str | None]) -> None:
        self.usage = body.get("usage") or self.usage
        for choice in body["choices"]:
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + (text_of(choice) or "")
            if choice["finish_reason"]:
                assert index not in self.reasons
                self.reasons[index] = choice["finish_reason"]


@dataclass
class Asked:
    """One request: ``prompts`` of the list above, ``n`` answers to each."""

    num_prompts: int
    n: int
    chat: bool = False
    stream: bool = False
    options: dict[str, Any] = field(default_factory=lambda: GREEDY)

    @property
    def prompts(self) -> list[str]:
        return PROMPTS[: self.num_prompts]

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def body(self) -> dict[str, Any]:
        what: dict[str, Any] = {"prompt": self.prompts}
        if self.chat:
            what = {"messages": [{"role": "user", "content": self.prompts[0]}]}
        usage = {"stream_options": {"include_usage": True}} if self.stream else {}
        limits = {"n": self.n, "max_tokens": MAX_TOKENS, "stream": self.stream}
        return {**what, **limits, **usage, **self.options}

    def choices(self, client: httpx.Client) -> Choices:
        found = Choices()
        reply = client.post(self.path, json=self.body)
        assert reply.status_code == 200, reply.text
        if not self.stream:
            found.add(reply.json(), self._whole_text)
            return found
        events = [event.removeprefix("data: ") for event in reply.text.split("\n\n") if event]
        assert events.pop() == "[DONE]"
        for event in events:
            found.add(json.loads(event), self._piece_text)
        return found

    def _whole_text(self, choice: dict[str, Any]) -> str:
        return choice["message"]["content"] if self.chat else choice["text"]

    def _piece_text(self, choice: dict[str, Any]) -> str | None:
        return choice["delta"].get("content") if self.chat else choice["text"]


COMPLETIONS = [
    *((1, n) for n in range(1, 9)),
    *((count, 1) for count in range(2, 9)),
    *((2, 2), (3, 3)),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("one_of_each", marks=pytest.mark.slow),
        "standard",
        pytest.param("unified", marks=pytest.mark.slow),
    ],
)
def service(request):
    deployed = request.getfixturevalue(request.param)
    deployed.client.timeout = ANSWERED_WITHIN_S
    return deployed


@pytest.fixture(scope="module")
def one_of_each(services, tiny_llama):
    limits = {"max_num_seqs": 4, "max_waiting": 40, "deadlines": {"lease_s": LEASE_S}}
    return services.get(model=str(tiny_llama), **limits)


@pytest.fixture(autouse=True)
def _idle_afterwards(service):
    yield
    service.check_idle()


@pytest.fixture(scope="module")
def reference(service, tiny_model, byte_tokenizer, unified_model):
    """``reference(prompt, sampling)``: the answer to one prompt alone, in this process."""
    is_unified = service.settings.mode == "unified"
    dense = LocalPipeline(tiny_model("llama"), byte_tokenizer)
    pipeline, one_at_a_time = unified_model.pipeline() if is_unified else dense, Lock()

    @cache
    def answer(prompt, sampling):
        (completion,) = pipeline.generate([prompt], SamplingParams.model_validate_json(sampling))
        return completion

    def alone(prompt, sampling):
        with one_at_a_time:
            return answer(prompt, sampling.model_dump_json())

    return alone


def check(asked: Asked, client: httpx.Client, reference: Any) -> None:
    """Every choice is what its prompt and its seed give alone; none is missing, none comes twice.

    The choices of a prompt follow each other, and the first of them has the client's own seed.
    """
    parsed = CompletionRequest(prompt="", n=asked.n, **asked.options)
    seeds = parsed.sampling(parsed.answer_limit or MAX_TOKENS)
    if "seed" in asked.options:
        assert seeds[0].seed == asked.options["seed"]
    alone = [reference(prompt, sampling) for prompt in asked.prompts for sampling in seeds]
    found = asked.choices(client)
    assert found.texts == {index: answer.text for index, answer in enumerate(alone)}
    assert found.reasons == {index: answer.finish_reason for index, answer in enumerate(alone)}
    num_prompt_tokens = sum(len(prompt.encode()) for prompt in asked.prompts)
    num_answer_tokens = sum(len(answer.token_ids) for answer in alone)
    assert found.usage == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
    }


@pytest.mark.parametrize(
    ("options", "stream"),
    [
        pytest.param(GREEDY, False, id="greedy"),
        pytest.param(SEEDED, True, id="seeded-streamed"),
        pytest.param(SEEDED, False, id="seeded", marks=pytest.mark.slow),
        pytest.param(GREEDY, True, id="greedy-streamed", marks=pytest.mark.slow),
    ],
)
def test_completions(service, reference, options, stream):
    for num_prompts, n in COMPLETIONS:
        asked = Asked(num_prompts, n, stream=stream, options=options)
        check(asked, service.client, reference)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(service, reference, stream):
    for n, options in zip(range(1, 9), itertools.cycle([SEEDED, GREEDY])):
        check(Asked(1, n, chat=True, stream=stream, options=options), service.client, reference)


def test_as_many_answers_as_there_are_waiting_places(service, reference):
    check(Asked(8, service.settings.max_waiting // 8), service.client, reference)


def test_several_clients_at_once(service, reference):
    asked = [Asked(2, 2, stream=bool(number % 2), options=SEEDED) for number in range(8)]
    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(lambda one: check(one, service.client, reference), asked))


def test_a_client_that_leaves_cancels_all_its_answers(service):
    body = {"prompt": PROMPTS[:3], "n": 2, "max_tokens": 400, "ignore_eos": True, **GREEDY}
    for num_lines in (0, 1, 9):
        streamed = {**body, "stream": True}
        with service.client.stream("POST", "/v1/completions", json=streamed) as answer:
            lines = answer.iter_lines()
            for _ in range(num_lines):
                next(lines)
        service.check_idle()
    for patience_s in (0.02, 0.3):
        with pytest.raises(httpx.ReadTimeout):
            service.client.post("/v1/completions", json=body, timeout=patience_s)
        service.check_idle()


def test_more_answers_than_waiting_places_are_refused_together(service):
    num_answers = 1 + service.settings.max_waiting // len(PROMPTS)
    body = {"prompt": PROMPTS, "n": num_answers, "max_tokens": 2}
    for stream in (False, True):
        refused = service.client.post("/v1/completions", json={**body, "stream": stream})
        assert refused.status_code == 429
        assert "fewer answers" in refused.json()["error"]["message"]
        service.check_idle()


def test_a_prompt_that_cannot_be_answered_refuses_the_others_before_they_begin(service):
    before = numbers_of(service)
    body = {"prompt": ["fine", "x" * 600, "fine"], "n": 2, "max_tokens": 2}
    refused = service.client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert "600" in refused.json()["error"]["message"]
    assert numbers_of(service) == before


def test_every_answer_is_counted_and_every_prompt_is_sent_once(service):
    before = numbers_of(service)
    asked = Asked(3, 2, options={**GREEDY, "ignore_eos": True})
    asked.choices(service.client)
    grown = {name: value - before[name] for name, value in numbers_of(service).items()}
    num_transfers = 0 if service.settings.mode == "unified" else 3
    assert grown == {
        "rayapp_request_success_total": 6,
        "rayapp_generation_tokens_total": 6 * MAX_TOKENS,
        "rayapp_prompt_tokens_total": sum(map(len, asked.prompts)),
        "transfers": num_transfers,
    }
    if num_transfers:
        recent = service.client.get("/v1/transfers").json()["recent"][-num_transfers:]
        assert len({record["request_id"] for record in recent}) == num_transfers
        assert {record["attempt"] for record in recent} == {0}


def numbers_of(service) -> dict[str, float]:
    """Counters of the service, and its ledger's."""
    counted = dict.fromkeys(
        (
            "rayapp_request_success_total",
            "rayapp_generation_tokens_total",
            "rayapp_prompt_tokens_total",
        ),
        0.0,
    )
    for line in service.client.get("/metrics").text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in counted:
            counted[name] += float(line.rpartition(" ")[2])
    totals = service.client.get("/v1/transfers").json()["totals"]
    return {**counted, "transfers": totals["num_transfers"]}


def test_calls_that_are_never_routed_end_in_a_deadline(service, monkeypatch):
    """Serve's router in this process finds no replica with a place free, and tries for ever."""

    async def nobody(*_, **__):
        return None

    async def scenario():
        requests = [GenerationRequest(f"never-{number}", (1, 2, 3)) for number in range(3)]
        return await asyncio.gather(*(ask(request) for request in requests), return_exceptions=True)

    async def ask(request):
        async with aclosing(stage.generate([request])) as batches:
            return [batch async for batch in batches]

    short = service.settings.deadlines.model_copy(update={"queue_s": 1.0, "prefill_s": 0.3})
    settings = service.settings.model_copy(update={"deadlines": short})
    pools = {name: service.handle(name) for name in settings.pools}
    stage = open_service(settings, pools, service.handle("ingress"))
    assert all(isinstance(answer, list) for answer in asyncio.run(scenario()))
    monkeypatch.setattr(RequestRouter, "_select_from_candidate_replicas", nobody)
    for error in asyncio.run(scenario()):
        assert isinstance(error, DeadlineError)
        is_apart = settings.mode == "disaggregated"  # There, room in decode is booked first.
        phase = "queue did not end within 1.0 s" if is_apart else "prefill did not end within 1.3 s"
        assert phase in str(error)
    assert not any(stage.counts().values())


@pytest.mark.slow
@pytest.mark.parametrize("service", ["standard"], indirect=True)
def test_a_lost_decode_replica_changes_no_answer(service, reference):
    """Several answers of one request are prefilled again, once per prompt, and replayed."""
    asked = Asked(2, 4, stream=True, options={**SEEDED, "max_tokens": 150, "ignore_eos": True})
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(check, asked, service.client, reference)
        busy: list[str] = []
        while not busy:
            assert not answered.done()
            health = service.client.get("/health").json()
            busy = [r["replica_id"] for r in health["pools"]["decode"] if r["num_running"]]
        os.kill(service.replicas("decode")[busy[0]], signal.SIGKILL)
        answered.result()
    service.wait_for("decode", {2})


@pytest.mark.slow
def test_clients_that_leave_at_any_time(service):
    """Clients leave in every phase of an answer; an admitted one's lease would last long unread."""
    body = {"prompt": PROMPTS[:3], "n": 2, "max_tokens": 100, "ignore_eos": True, **GREEDY}
    for number in range(100):
        patience_s = 0.01 + 0.004 * number
        with suppress(httpx.ReadTimeout):
            service.client.post("/v1/completions", json=body, timeout=patience_s)
        if number % 10 == 9:
            service.check_idle()


@pytest.mark.slow
def test_a_hundred_and_more_of_all_kinds(service, reference):
    """Several prompts, several answers, both, and chats; whole and streamed; four at a time."""

    def ask(number):
        kind, number = number % 4, number // 4
        count, stream = 1 + number % 8, bool(number // 8 % 2)
        asked = (
            Asked(1, count, stream=stream),
            Asked(count, 1, stream=stream),
            Asked(1 + number % 3, 2 + number % 2, stream=stream),
            Asked(1, count, chat=True, stream=stream),
        )[kind]
        check(asked, service.client, reference)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(160)))
