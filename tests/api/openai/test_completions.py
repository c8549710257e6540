"""Completions, through the real client."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from rayapp.engine.stopping import TextStream

EOS = 256


def streamed(client, **body):
    """The sum of a stream: texts and finish reasons by index, the last usage, the ids."""
    got = SimpleNamespace(texts={}, reasons={}, usage=None, ids=set(), chunks=[])
    for chunk in client.completions.create(model="tiny", stream=True, **body):
        got.chunks.append(chunk)
        got.ids.add(chunk.id)
        got.usage = chunk.usage or got.usage
        for choice in chunk.choices:
            got.texts[choice.index] = got.texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                assert choice.index not in got.reasons
                got.reasons[choice.index] = choice.finish_reason
    return got


def test_a_text_prompt(client, service):
    reply = client.completions.create(model="tiny", prompt="hi ☃", max_tokens=100)
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    assert reply.choices[0].text == service.text
    assert reply.choices[0].finish_reason == "stop"
    assert service.requests[0].prompt_token_ids == tuple("hi ☃".encode())
    assert service.requests[0].sampling.temperature == 1.0
    num_tokens = len(service.text.encode()) + 1
    assert reply.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 6,
        "completion_tokens": num_tokens,
        "total_tokens": 6 + num_tokens,
    }


def test_without_a_limit_an_answer_has_16_tokens(client, service):
    reply = client.completions.create(model="tiny", prompt="hi")
    assert reply.usage.completion_tokens == 16
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].text == service.text.encode()[:16].decode()


def test_the_default_limit_is_cut_to_the_room_left(client):
    reply = client.completions.create(model="tiny", prompt=[1] * 190)
    assert reply.usage.completion_tokens == 10


def test_a_chat_clients_name_for_the_limit(http, service):
    body = {"prompt": "hi", "max_completion_tokens": 3, "max_tokens": 7}
    assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ],
)
def test_every_form_of_prompt(client, service, prompt, expected):
    reply = client.completions.create(model="tiny", prompt=prompt, n=2, max_tokens=4)
    assert [choice.index for choice in reply.choices] == list(range(2 * len(expected)))
    prompts = [request.prompt_token_ids for request in service.requests]
    assert prompts == [ids for ids in expected for _ in range(2)]
    assert reply.usage.prompt_tokens == sum(map(len, expected))
    assert reply.usage.completion_tokens == 8 * len(expected)


def test_choices_differ_in_seed_prompts_do_not(client, service):
    client.completions.create(model="tiny", prompt=["a", "b"], n=3, seed=7, max_tokens=1)
    seeds = [request.sampling.seed for request in service.requests]
    assert seeds[0] == 7
    assert len(set(seeds[:3])) == 3
    assert seeds[:3] == seeds[3:]


def test_without_a_seed_chance_decides(client, service):
    for _ in range(2):
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
    first, second = (request.sampling.seed for request in service.requests)
    assert first != second


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("stop", [None, "says", [" ☃", "zzz"], ["stop", "says: st"], "T"])
def test_streamed_text_equals_whole_text_and_no_stop_string_leaks(
    client, service, byte_tokenizer, batch_size, stop
):
    service.batch_size = batch_size
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 100, "stop": stop}
    whole = client.completions.create(model="tiny", **body)
    parts = streamed(client, stream_options={"include_usage": True}, **body)
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    ends = [at for at in map(service.text.find, stops) if at >= 0]
    expected = service.text[: min(ends)] if ends else service.text
    assert [choice.text for choice in whole.choices] == [expected] * 4
    assert parts.texts == dict.fromkeys(range(4), expected)
    assert parts.reasons == dict.fromkeys(range(4), "stop")
    assert parts.usage == whole.usage
    assert len(parts.ids) == 1


def test_half_a_character_never_leaves_early(client, service):
    service.text = "☃☃"
    parts = streamed(client, prompt="a", max_tokens=4)
    assert parts.texts[0] == "☃\ufffd"
    assert all("\ufffd" not in c.choices[0].text for c in parts.chunks[:-1])


def test_a_stream_as_bytes(http):
    body = {"prompt": "a", "max_tokens": 2, "stream": True, "model": "tiny"}
    reply = http.post("/v1/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in reply.headers
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["T", "h"]
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_last_and_alone(client):
    parts = streamed(
        client, prompt="abc", max_tokens=5, n=2, stream_options={"include_usage": True}
    )
    assert parts.chunks[-1].choices == []
    assert parts.chunks[-1].usage.completion_tokens == 10
    assert parts.chunks[-1].usage.prompt_tokens == 3
    assert all(chunk.usage is None for chunk in parts.chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, service, stream):
    service.text, service.batch_size = "☃a", 2
    body = {"prompt": "x", "max_tokens": 100, "logprobs": 2}
    if stream:
        chunks = streamed(client, **body).chunks
        logprobs = [chunk.choices[0].logprobs for chunk in chunks]
    else:
        logprobs = [client.completions.create(model="tiny", **body).choices[0].logprobs]
    tokens = [token for entry in logprobs for token in entry.tokens]
    assert tokens == ["bytes:\\xe2", "bytes:\\x98", "bytes:\\x83", "a", "<|end|>"]
    offsets = [offset for entry in logprobs for offset in entry.text_offset]
    assert offsets == [0, 10, 20, 30, 31]
    assert [v for entry in logprobs for v in entry.token_logprobs] == [-0.5] * 5
    tops = [top for entry in logprobs for top in entry.top_logprobs]
    assert tops[3] == {"a": -0.5, "!": -2.0}
    assert all(top[token] == -0.5 for top, token in zip(tops, tokens, strict=True))


def test_zero_logprobs_report_the_token_itself(client):
    reply = client.completions.create(model="tiny", prompt="x", max_tokens=1, logprobs=0)
    assert reply.choices[0].logprobs.top_logprobs == [{"T": -0.5}]


def test_a_probability_of_zero_is_json(byte_tokenizer):
    from rayapp.api.openai.token_text import best_alternatives
    from rayapp.engine.request import TokenLogprobs

    entry = TokenLogprobs(float("-inf"), ((98, -0.1),))
    best = best_alternatives(byte_tokenizer, 97, entry)
    assert json.loads(json.dumps(best, allow_nan=False)) == {"b": -0.1, "a": -9999.0}


def test_sampling_reaches_the_service(client, service):
    client.completions.create(
        model="tiny",
        prompt="x",
        temperature=0.3,
        top_p=0.9,
        seed=-1,
        stop=["q", ""],
        extra_body={"top_k": -1, "ignore_eos": True, "some_other_key": {"a": 1}},
    )
    sampling = service.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.9, 0)
    assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (2**63 - 1, ("q",), True)
    assert sampling.logprobs is None


def test_request_ids_are_ours(http, service):
    http.post("/v1/completions", json={"prompt": ["a", "b"], "request_id": "mine", "id": "mine"})
    ids = [request.request_id for request in service.requests]
    assert len(set(ids)) == 2
    assert all(len(request_id) == 32 and int(request_id, 16) for request_id in ids)


def test_answers_run_concurrently(http, service):
    service.gap_s = 0.01
    http.post("/v1/completions", json={"prompt": ["a"] * 16, "max_tokens": 20})
    assert service.most_active == 16


def test_the_stream_helper_and_the_service_agree_on_text(service, byte_tokenizer):
    stream = TextStream(byte_tokenizer, ())
    assert stream.push([*service.text.encode(), EOS]) + stream.flush() == service.text


def test_penalties_and_bias_reach_the_service(client, service):
    client.completions.create(
        model="tiny",
        prompt="a",
        presence_penalty=0.5,
        frequency_penalty=-1.5,
        logit_bias={"65": -100, "66": 2.5},
        extra_body={"repetition_penalty": 1.1, "min_tokens": 3},
    )
    sampling = service.requests[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1.5)
    assert (sampling.repetition_penalty, sampling.min_tokens) == (1.1, 3)
    assert sampling.logit_bias == {65: -100.0, 66: 2.5}


def test_a_stop_text_within_the_least_length_is_part_of_the_answer(client, service):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 40, "stop": ["na", " "]}
    short = client.completions.create(**body).choices[0].text
    long = client.completions.create(**body, extra_body={"min_tokens": 8}).choices[0].text
    assert short == service.text.split(" ")[0]
    assert long == service.text.split(" snow")[0]
    streamed_text = streamed(
        client, prompt="a", max_tokens=40, stop=["na", " "], extra_body={"min_tokens": 8}
    )
    assert streamed_text.texts == {0: long}


def test_token_ids_become_text_again(http):
    tokens = http.post("/tokenize", json={"prompt": "hi ☃"}).json()["tokens"]
    reply = http.post("/detokenize", json={"model": "tiny", "tokens": tokens})
    assert reply.json() == {"prompt": "hi ☃"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for wrong in ([300], [-1], ["a"], [1.5], None):
        assert http.post("/detokenize", json={"tokens": wrong}).status_code == 400
    assert http.post("/detokenize", json={"model": "x", "tokens": [1]}).status_code == 404


def test_an_echoed_prompt_comes_before_its_answer(client, service, byte_tokenizer):
    """As lm-evaluation-harness asks: one entry per token of both, the first of them null."""
    body = {"prompt": ["hi ☃", "b"], "max_tokens": 2, "n": 2}
    reply = client.completions.create(model="tiny", echo=True, logprobs=1, **body)
    texts = [choice.text for choice in reply.choices]
    assert texts == ["hi ☃Th", "hi ☃Th", "bTh", "bTh"]
    logprobs = reply.choices[0].logprobs
    ids = "hi ☃".encode()
    assert logprobs.token_logprobs == [None, *(-t / 8 for t in ids[1:]), -0.5, -0.5]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1] == {"i": -ids[1] / 8}
    assert logprobs.tokens[:2] == ["h", "i"]
    assert [len(v) for v in (logprobs.tokens, logprobs.top_logprobs, logprobs.text_offset)] == [
        8
    ] * 3
    assert reply.choices[2].logprobs.token_logprobs == [None, -0.5, -0.5]
    assert reply.usage.completion_tokens == 8
    sums = streamed(client, echo=True, logprobs=1, **body)
    assert sums.texts == dict(enumerate(texts))
    entries = [
        entry
        for chunk in sums.chunks
        for choice in chunk.choices
        if choice.index == 0
        for entry in choice.logprobs.token_logprobs
    ]
    assert entries == logprobs.token_logprobs


def test_an_echo_needs_no_log_probabilities(client, service):
    reply = client.completions.create(model="tiny", prompt=[104, 105], echo=True, max_tokens=1)
    assert reply.choices[0].text == "hiT"
    assert reply.choices[0].logprobs is None
    assert service.requests[0].sampling.prompt_logprobs is None
    assert streamed(client, prompt="hi", echo=True, max_tokens=1).texts == {0: "hiT"}
