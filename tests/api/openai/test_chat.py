"""Chat completions, through the real client."""

from __future__ import annotations

import pytest

HELLO = [{"role": "user", "content": "hi"}]


def test_an_answer(client, service):
    reply = client.chat.completions.create(model="tiny", messages=HELLO)
    choice = reply.choices[0]
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert (choice.message.role, choice.message.content) == ("assistant", service.text)
    assert choice.finish_reason == "stop"
    assert service.requests[0].sampling.max_tokens == 198
    assert reply.usage.prompt_tokens == 2


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_limit(client, limit):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, **{limit: 3})
    assert reply.choices[0].message.content == "The"
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_stream_says_the_role_first_and_adds_up(client, service, batch_size):
    service.batch_size = batch_size
    texts, roles, reasons, usage = {}, [], {}, None
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        n=2,
        stop=["says"],
        stream=True,
        stream_options={"include_usage": True},
    ):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.role:
                assert choice.index not in texts
                roles.append(choice.index)
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == dict.fromkeys((0, 1), service.text.split("says")[0])
    assert sorted(roles) == [0, 1]
    assert reasons == dict.fromkeys((0, 1), "stop")
    assert usage.prompt_tokens == 2


def test_parts_and_roles(client, service, byte_tokenizer):
    byte_tokenizer_template = byte_tokenizer.chat_template
    try:
        byte_tokenizer.chat_template = (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}"
        )
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        client.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "developer", "content": "be"},
                {"role": "user", "content": parts, "name": "x"},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"},
            ],
        )
    finally:
        byte_tokenizer.chat_template = byte_tokenizer_template
    expected = b"[system]be[user]ab[assistant]c[user]d>"
    assert bytes(service.requests[0].prompt_token_ids) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, service, stream):
    service.text = "☃a"
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "stream": stream}
    reply = client.chat.completions.create(model="tiny", **body)
    chunks = list(reply) if stream else [reply]
    found = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    content = [token for entry in found for token in entry.content]
    assert [token.bytes for token in content] == [[0xE2], [0x98], [0x83], [97], [*b"<|end|>"]]
    assert [token.logprob for token in content] == [-0.5] * 5
    assert [top.token for top in content[3].top_logprobs] == ["a", "!"]


def test_logprobs_without_alternatives(client, service):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True)
    assert reply.choices[0].logprobs.content[0].top_logprobs == []
    assert service.requests[0].sampling.logprobs == 0


def test_a_model_without_a_template_says_so(http, service, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", None)
    reply = http.post("/v1/chat/completions", json={"messages": HELLO})
    assert reply.status_code == 400
    assert "/v1/completions" in reply.json()["error"]["message"]


def test_a_template_that_refuses(http, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", "{{ raise_exception('only one turn') }}")
    reply = http.post("/v1/chat/completions", json={"messages": HELLO})
    assert reply.status_code == 400
    assert "only one turn" in reply.json()["error"]["message"]


def test_tokenize(http):
    reply = http.post("/tokenize", json={"prompt": "hé", "model": "tiny"}).json()
    assert reply == {"count": 3, "max_model_len": 200, "tokens": [104, 195, 169]}
    assert http.post("/tokenize", json={"messages": HELLO}).json()["tokens"] == [104, 105]
    assert http.post("/tokenize", json={}).status_code == 400


def test_penalties_and_bias_reach_the_service(client, service):
    client.chat.completions.create(
        model="tiny", messages=HELLO, presence_penalty=-0.5, logit_bias={"7": 1}
    )
    sampling = service.requests[0].sampling
    assert (sampling.presence_penalty, sampling.logit_bias) == (-0.5, {7: 1.0})
