"""The dense standard service on its nodes, over HTTP."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from itertools import islice, product

import httpx
import pytest
import ray
import torch
from openai import OpenAI

from rayapp.distributed.serve.exposure import serving_host
from tests.services import KEY

pytestmark = pytest.mark.ray

FIELDS = ("visual_tokens", "blocks", "tokens", "encoding")


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def service(standard):
    return standard


@pytest.fixture(autouse=True)
def _idle_afterwards(service):
    yield
    service.check_idle()


def prompts(count, longest=120):
    lengths = [1 + (number * 37) % longest for number in range(count)]
    return [[(7 * n + 3 * i + i * i) % 250 for i in range(le)] for n, le in enumerate(lengths)]


def dense_text(model, tokenizer, prompt, max_tokens):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_sixteen_concurrent_answers_equal_generate(service, model, byte_tokenizer):
    asked = prompts(16)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: service.complete(p, max_tokens=20), asked))
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["text"] == dense_text(model, byte_tokenizer, prompt, 20)


def test_several_answers_of_one_request(service, model, byte_tokenizer):
    """More than there are slots; see ``test_several_answers`` for all shapes."""
    asked = prompts(3)
    body = {"model": "tested", "prompt": asked, "n": 2, "max_tokens": 9, "temperature": 0}
    for _ in range(5):
        answer = service.client.post("/v1/completions", json=body, timeout=60)
        texts = [choice["text"] for choice in answer.json()["choices"]]
        assert texts == [
            dense_text(model, byte_tokenizer, prompt, 9) for prompt in asked for _ in range(2)
        ]


def test_streaming_equals_not_streaming(service):
    client = OpenAI(base_url=f"{service.settings.url}/v1", api_key=KEY)
    asked = {"model": "tested", "prompt": "What a day!", "max_tokens": 24, "seed": 5}
    for temperature in (0.0, 0.9):
        whole = client.completions.create(**asked, temperature=temperature)
        parts = client.completions.create(**asked, temperature=temperature, stream=True)
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_each_pool_is_on_its_own_node(service, cluster):
    pools = service.client.get("/health").json()["pools"]
    nodes = {name: {replica["node"] for replica in found} for name, found in pools.items()}
    assert nodes == {"prefill": {cluster.nodes[1].node_id}, "decode": {cluster.nodes[2].node_id}}
    kv_bytes = 5 * 2 * 2 * 16 * 4 * service.settings.max_num_seqs * 512
    assert [decode["kv_bytes"] for decode in pools["decode"]] == [kv_bytes] * 2


def test_the_ledger_counts_every_transfer(service, cluster):
    before = service.client.get("/v1/transfers").json()["totals"]
    for prompt in prompts(3):
        assert service.complete(prompt, max_tokens=2).status_code == 200
    after = service.client.get("/v1/transfers").json()
    totals, sizes = after["totals"], [len(p) for p in prompts(3)]
    entry_bytes = 5 * 2 * 2 * 16 * 4
    assert totals["num_transfers"] - before["num_transfers"] == 3
    assert totals["bytes_full"] - before["bytes_full"] == sum(sizes) * entry_bytes
    saved = sum(totals[f"saved_by_{field}_bytes"] for field in FIELDS)
    assert totals["bytes_full"] == totals["bytes_sent"] - totals["overhead_bytes"] + saved
    (link,) = after["links"]
    assert link["source_node"] == cluster.nodes[1].node_id
    assert link["destination_node"] == cluster.nodes[2].node_id
    assert after["recent"][-1]["fetch_s"] > 0
    body = {"model": "tested", "prompt": "x" * 200, "max_tokens": 3, "ignore_eos": True}
    told = service.client.post("/v1/completions", json=body, headers={"X-Rayapp-Timeline": "1"})
    spans = told.json()["choices"][0]["timeline"]
    assert spans["transfer"] == service.client.get("/v1/transfers").json()["recent"][-1]
    assert spans["queue_s"] + spans["prefill_s"] <= spans["ttft_s"] <= spans["e2e_s"]


@pytest.mark.parametrize("num_tokens", [9, 440], ids=["whole", "parts"])
def test_clients_that_leave_free_everything_at_once(service, num_tokens):
    """They leave in all phases, often enough for races with Serve's own cancellation to happen."""
    body = {
        "model": "tested", "prompt": [(7 * i) % 250 for i in range(num_tokens)], "max_tokens": 60,
        "ignore_eos": True, "stream": True, "temperature": 0,
    }  # fmt: skip
    for pause_s in (0.005, 0.01, 0.02, 0.04) * 5:  # before the first line, too
        with suppress(httpx.TimeoutException):
            service.client.post("/v1/completions", json=body, timeout=pause_s)
    for num_lines, pause_s in product((0, 0, 1, 1, 2, 9), (0, 0, 0.002, 0.01, 0.03)):
        with service.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(num_lines):
                next(lines)
            time.sleep(pause_s)
    service.check_idle()


def test_beyond_the_waiting_places_it_is_429(service):
    """While decode admits nobody, exactly the waiting places are taken; their answers all come."""
    extra, num_places = 5, service.settings.max_waiting

    def ask(number: int) -> int:
        body = {"model": "tested", "prompt": [number, 9, 9], "max_tokens": 4, "ignore_eos": True}
        return service.client.post("/v1/completions", json=body).status_code

    with ThreadPoolExecutor(num_places + extra) as pool:
        with service.stopped(*service.replicas("decode").values()):
            calls = [pool.submit(ask, number) for number in range(num_places + extra)]
            refused = [call.result() for call in islice(as_completed(calls), extra)]
            time.sleep(0.5)
            assert sum(call.done() for call in calls) == extra
        codes = [call.result() for call in calls]
    assert refused == [429] * extra
    assert codes.count(200) == num_places


def test_a_bad_request_is_refused_and_the_service_goes_on(service):
    too_long = service.complete([1] * 600, max_tokens=2)
    assert too_long.status_code == 400
    assert "600" in too_long.json()["error"]["message"]
    bad = service.client.post("/v1/completions", content=b"{not json")
    assert 400 <= bad.status_code < 500
    assert (
        service.client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    )
    assert service.complete("fine", max_tokens=2).status_code == 200


def test_echoed_prompts_have_the_models_log_probabilities(service, model):
    """What lm-evaluation-harness reads, on prompts in several chunks too."""
    asked = [prompt for prompt in prompts(9) if len(prompt) > 1]
    body = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    reply = service.complete(asked, **body).json()
    for prompt, choice in zip(asked, reply["choices"], strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt])).logits[0]
        logprobs_TV = logits_TV.double().log_softmax(-1)
        first, *others = choice["logprobs"]["token_logprobs"]
        assert first is None
        following = [*prompt[1:], int(logprobs_TV[-1].argmax())]
        want = [row[token].item() for row, token in zip(logprobs_TV, following, strict=True)]
        assert others == pytest.approx(want, abs=1e-4)
        for row, token, own, best in zip(
            logprobs_TV, following, others, choice["logprobs"]["top_logprobs"][1:], strict=True
        ):
            assert (max(best.values()) == own) == (int(row.argmax()) == token)


def test_where_an_application_is_built_it_is_known_where_serve_listens(service):
    assert ray.get(ray.remote(num_cpus=0)(serving_host).remote()) == service.settings.host


def test_an_answer_of_one_token_sends_nothing(service):
    before = service.client.get("/v1/transfers").json()["totals"]["num_transfers"]
    answer = service.complete("abc", max_tokens=1)
    assert answer.json()["usage"]["completion_tokens"] == 1
    assert service.client.get("/v1/transfers").json()["totals"]["num_transfers"] == before


def test_the_first_token_leaves_before_the_last(service):
    body = {"model": "tested", "prompt": "go", "max_tokens": 300, "stream": True,
            "temperature": 0, "ignore_eos": True}  # fmt: skip
    times = []
    with service.client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                json.loads(line.removeprefix("data: "))
                times.append(time.monotonic())
    assert times[-1] - times[0] > 0.05
    assert len(times) > 3
