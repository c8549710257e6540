"""Real engines behind the real interface."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing

import httpx
import openai
import pytest

from rayapp.api.routes import build_app
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import DeadlineError, OverloadedError, UnavailableError
from tests.api.in_process import InProcessService, Patience

PROMPTS = ["hello", "a", "the quick brown fox", "0123456789" * 3]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def engines(model, byte_tokenizer):
    service = InProcessService(
        model, byte_tokenizer, model_name="tiny", max_num_seqs=3, max_model_len=160
    )
    yield service
    service.close()


@pytest.fixture(scope="module")
def url(engines, serve_app):
    with serve_app(build_app(engines)) as address:
        yield address


@pytest.fixture
def client(url, engines):
    with openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as opened:
        yield opened
    engines.check_idle()


@pytest.fixture(scope="module")
def reference(model, byte_tokenizer):
    return LocalPipeline(model, byte_tokenizer, max_model_len=160)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_served_text_is_the_reference(client, reference, temperature):
    sampling = SamplingParams(max_tokens=24, temperature=temperature, seed=5)
    expected = reference.generate(PROMPTS, sampling)
    body = {"model": "tiny", "prompt": PROMPTS, "max_tokens": 24, "seed": 5}
    whole = client.completions.create(temperature=temperature, **body)
    assert [c.text for c in whole.choices] == [e.text for e in expected]
    assert [c.finish_reason for c in whole.choices] == [e.finish_reason for e in expected]
    assert whole.usage.completion_tokens == sum(len(e.token_ids) for e in expected)
    texts = [""] * len(PROMPTS)
    for chunk in client.completions.create(temperature=temperature, stream=True, **body):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [e.text for e in expected]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_timelines_come_if_they_are_asked_for(client, url, path):
    asked = (
        {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    )
    body = {"model": "tiny", "max_tokens": 4, "n": 2, "ignore_eos": True, **asked}
    headers = {"X-Rayapp-Timeline": "1"}
    whole = httpx.post(url + path, json=body, headers=headers).json()
    lines = httpx.post(url + path, json={**body, "stream": True}, headers=headers).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed = [choice for chunk in chunks for choice in chunk["choices"]]
    ended = [choice for choice in streamed if choice["finish_reason"]]
    assert len(whole["choices"]) == len(ended) == 2
    for choice in (*whole["choices"], *ended):
        spans = choice["timeline"]
        assert 0 < spans["ttft_s"] <= spans["e2e_s"] < 60
        assert spans["prefill_s"] > 0
    assert all("timeline" not in choice for choice in streamed if not choice["finish_reason"])
    unasked = httpx.post(url + path, json=body).json()
    assert all("timeline" not in choice for choice in unasked["choices"])


def test_choices_differ(client):
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], n=4, max_tokens=12, seed=1
    )
    assert len({choice.message.content for choice in reply.choices}) == 4


def test_metrics_know_every_phase(client, url):
    client.completions.create(
        model="tiny", prompt="hi", max_tokens=4, extra_body={"ignore_eos": True}
    )
    text = httpx.get(url + "/metrics").text
    for phase in ("request_queue_time", "request_prefill_time", "request_decode_time"):
        assert f"rayapp_{phase}_seconds_count" in text
        assert f"rayapp_{phase}_seconds_count 0.0" not in text
    assert httpx.get(url + "/v1/transfers").json()["totals"]["num_transfers"] > 0
    assert httpx.get(url).status_code == 200


@pytest.fixture
def stuck(model, byte_tokenizer, monkeypatch):
    """A service whose prefill waits until told, with one slot and one waiting place."""
    service = InProcessService(
        model,
        byte_tokenizer,
        max_num_seqs=1,
        max_model_len=64,
        patience=Patience(max_waiting=1, deadline_s=0.5),
    )
    gate, prefill = threading.Event(), service._stages.prefill
    run = prefill.run
    monkeypatch.setattr(prefill, "run", lambda request: gate.wait(10) and run(request))
    service.gate = gate
    yield service
    gate.set()
    service.close()


async def answer(service, name, **sampling):
    request = GenerationRequest(name, (1, 2), SamplingParams(ignore_eos=True, **sampling))
    async with aclosing(service.generate([request])) as batches:
        return [token async for batch in batches for token in batch.token_ids]


def test_beyond_the_waiting_places_requests_are_refused(stuck):
    async def scenario():
        tasks = []
        for name in ("runs", "waits", "waits-too", "refused"):
            tasks.append(asyncio.create_task(answer(stuck, name, max_tokens=2)))
            await asyncio.sleep(0.02)
        stuck.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(scenario())
    assert len(results[0]) == 2
    assert any(isinstance(r, OverloadedError) for r in results[1:])
    assert any(not isinstance(r, Exception) for r in results[1:])


def test_a_wait_ends_at_its_deadline(stuck):
    with pytest.raises(DeadlineError, match=r"0\.5 s"):
        asyncio.run(answer(stuck, "slow", max_tokens=2))
    stuck.gate.set()
    assert len(asyncio.run(answer(stuck, "next", max_tokens=3))) == 3


def test_a_failing_step_fails_its_requests_and_no_other(model, byte_tokenizer, monkeypatch):
    service = InProcessService(model, byte_tokenizer, max_model_len=64)
    step = service._decode.step
    failures = iter([ValueError("broken")])

    def failing():
        if service._decode.num_running and (error := next(failures, None)):
            raise error
        return step()

    monkeypatch.setattr(service._decode, "step", failing)
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(answer(service, "a", max_tokens=3))
    assert len(asyncio.run(answer(service, "b", max_tokens=3))) == 3
    service.close()
    with pytest.raises(UnavailableError):
        asyncio.run(answer(service, "c", max_tokens=3))
    assert not asyncio.run(service.health()).ready
