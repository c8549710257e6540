"""Every error is one clear line in OpenAI's form, and the server goes on."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from fastapi import HTTPException

from rayapp.api.access import LimitBody
from rayapp.api.openai.prompts import PromptReader
from rayapp.errors import (
    DeadlineError,
    OverloadedError,
    RequestError,
    TransferError,
    UnavailableError,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def refused(reply, status=400):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("tools", [{"type": "function"}], []),
        ("tool_choice", "required", "none"),
        ("response_format", {"type": "json_object"}, {"type": "text"}),
        ("best_of", 3, 1),
        ("suffix", "x", None),
        ("chat_template", "{{ 1 }}", None),
        ("stop_token_ids", [3], []),
        ("prompt_embeds", "AAAA", None),
    ],
)
@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": MESSAGES})]
)
def test_unsupported_fields_are_named_and_neutral_values_pass(
    http, path, body, field, value, neutral
):
    assert f"`{field}`" in refused(http.post(path, json={**body, field: value}))["message"]
    reply = http.post(path, json={**body, field: neutral, "max_tokens": 1})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 17),
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("temperature", -1),
        ("temperature", 1e400),
        ("top_p", 0),
        ("top_k", -2),
        ("min_tokens", -1),
        ("min_tokens", 101),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 10.5),
        ("logit_bias", {"word": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"300": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(n): 1 for n in range(1025)}),
        ("logit_bias", [5]),
        ("logprobs", 21),
        ("seed", 2**63),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop", [1]),
        ("stream", "perhaps"),
        ("stream_options", 3),
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", ["a"] * 65),
        ("prompt", {"a": 1}),
        ("model", "m" * 600),
    ],
)
def test_every_field_is_bounded(http, field, value):
    import json

    content = json.dumps({"prompt": "a", field: value})
    reply = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    error = refused(reply)
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"


def test_too_many_answers(http, service):
    error = refused(http.post(COMPLETIONS, json={"prompt": ["a"] * 64, "n": 3}))
    assert "192" in error["message"]
    assert not service.requests


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]},
            "text-only",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "url"),
        ({"role": "user", "content": [{"type": "image_url", "text": "x"}]}, "image_url"),
        ({"role": "system", "content": [{"type": "image_url", "image_url": {"url": ""}}]}, "users"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "input_audio"),
        ({"role": "user", "content": 3}, "content"),
        ({"role": "user"}, "content"),
        ({"role": "king", "content": "x"}, "role"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}] * 257}, "257"),
    ],
)
def test_messages_that_cannot_be_read(http, message, says):
    assert says in refused(http.post(CHAT, json={"messages": [message]}))["message"]


def test_top_logprobs_need_logprobs(http):
    error = refused(http.post(CHAT, json={"messages": MESSAGES, "top_logprobs": 2}))
    assert "top_logprobs" in error["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}'],
)
def test_bad_bodies(http, content):
    headers = {"content-type": "application/json"}
    refused(http.post(COMPLETIONS, content=content, headers=headers))


def test_bad_json_says_where(http):
    headers = {"content-type": "application/json"}
    reply = http.post(COMPLETIONS, content=b'{"prompt": "a",}', headers=headers)
    message = refused(reply)["message"]
    assert "not JSON" in message
    assert "15" in message or "16" in message


def test_a_body_of_another_type_says_what_to_send(http):
    reply = http.post(COMPLETIONS, content=b"prompt=a", headers={"content-type": "text/plain"})
    assert "application/json" in refused(reply)["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies(http, chunked):
    large = b'{"prompt": "' + b"a" * (4 * 1024 * 1024) + b'"}'
    content = iter([large[:1000], large[1000:]]) if chunked else large
    headers = {"content-type": "application/json"}
    reply = http.post(COMPLETIONS, content=content, headers=headers)
    assert "4194304" in refused(reply, 413)["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_over_long_prompt(http, service, path):
    text = "a" * 250
    body = (
        {"prompt": text}
        if path == COMPLETIONS
        else {"messages": [{**MESSAGES[0], "content": text}]}
    )
    message = refused(http.post(path, json=body))["message"]
    assert "250" in message
    assert "200" in message
    assert "shorten" in message
    assert not service.requests


def test_prompt_and_limit_together_too_long(http, service):
    body = {"prompt": ["a", "a" * 150], "max_tokens": 60}
    message = refused(http.post(COMPLETIONS, json=body))["message"]
    assert "150" in message
    assert "60" in message
    assert not service.requests


@pytest.mark.parametrize("prompt", ["", [300], [-1], [10**30]])
def test_prompts_that_are_no_tokens(http, prompt):
    refused(http.post(COMPLETIONS, json={"prompt": prompt}))


def test_another_model(client, http):
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.completions.create(model="gpt-5", prompt="a")
    refused(http.get("/v1/models/gpt-5"), 404)


def test_unknown_paths_and_methods(http):
    refused(http.get("/v1/nothing"), 404)
    refused(http.get(COMPLETIONS), 405)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("all places are taken; try again later"), 429),
        (DeadlineError("too slow"), 504),
        (UnavailableError("no replica"), 503),
        (RequestError("no"), 400),
        (TransferError("lost"), 502),
        (ValueError("secret detail"), 500),
    ],
)
def test_errors_before_the_first_token_have_their_status(http, service, stream, error, status):
    service.errors = {0: error}
    body = {"prompt": ["a", "b", "c"], "n": 2, "stream": stream}
    reply = http.post(COMPLETIONS, json=body)
    found = refused(reply, status)
    assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert "secret" not in found["message"]
    service.wait_idle()
    service.errors = {}
    assert http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("error", [DeadlineError("too slow"), ValueError("secret detail")])
def test_an_error_in_a_stream_is_its_last_event(client, http, service, error):
    service.errors = {3: error}
    body = {"model": "tiny", "prompt": "a", "stream": True}
    text = http.post(COMPLETIONS, json=body).text
    assert '"error"' in text
    assert "[DONE]" not in text
    assert "secret" not in text
    with pytest.raises(openai.APIError):
        list(client.completions.create(**body))
    service.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_one_failing_answer_ends_its_siblings(http, service, stream):
    """The client gets one error, as the last event; no work goes on for it."""
    service.errors, service.gap_s = {2: UnavailableError("gone")}, 0.005
    service.fails = lambda request: request.prompt_token_ids == (98,)
    reply = http.post(COMPLETIONS, json={"prompt": ["a", "b", "c", "d"], "stream": stream})
    if stream:
        events = [event.removeprefix("data: ") for event in reply.text.split("\n\n") if event]
        assert ["error" in json.loads(event) for event in events] == [False] * (len(events) - 1) + [
            True
        ]
        assert json.loads(events[-1])["error"]["message"] == "gone"
    else:
        refused(reply, 503)
    service.wait_idle()
    assert service.cancelled == 4


def test_a_conversation_is_not_echoed(http):
    assert (
        "`echo`" in refused(http.post(CHAT, json={"messages": MESSAGES, "echo": True}))["message"]
    )


def test_without_a_place_nothing_is_tokenized(http, service, monkeypatch):
    service.full = OverloadedError("no place; try again later", 3)
    monkeypatch.setattr(PromptReader, "texts", None)
    monkeypatch.setattr(PromptReader, "chat", None)
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": MESSAGES})):
        reply = http.post(path, json=body)
        refused(reply, 429)
        assert reply.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_that_do_not_all_find_room_are_refused_together(http, service, stream):
    service.most_admitted = 3
    body = {"prompt": ["a", "b"], "n": 2, "stream": stream}
    reply = http.post(COMPLETIONS, json=body)
    assert "fewer" in refused(reply, 429)["message"]
    assert reply.headers["retry-after"] == "7"
    assert not service.requests
    service.most_admitted = 4
    assert http.post(COMPLETIONS, json=body).status_code == 200
    service.wait_idle()


def test_bodies_that_are_held_at_once_are_bounded():
    """The second body finds too little room while the first is held, and finds it afterwards."""
    go_on, statuses = asyncio.Event(), []

    async def app(scope, receive, send):
        await receive()
        await go_on.wait()

    async def send(message):
        statuses.append(message.get("status"))

    async def call(limited, size, declared=True):
        headers = [(b"content-length", str(size).encode())] if declared else []

        async def receive():
            return {"type": "http.request", "body": b"a" * size}

        await limited({"type": "http", "headers": headers}, receive, send)

    async def scenario():
        limited = LimitBody(app, max_bytes=100, max_bodies=2)
        first = [asyncio.ensure_future(call(limited, 90)) for _ in range(2)]
        await asyncio.sleep(0)
        await call(limited, 30)
        assert statuses == [429, None]
        with pytest.raises(HTTPException) as refused:
            await call(limited, 30, declared=False)
        assert refused.value.status_code == 429
        await call(limited, 101)
        assert statuses[2] == 413
        go_on.set()
        await asyncio.gather(*first, call(limited, 20))
        await call(limited, 100)
        assert len(statuses) == 4

    asyncio.run(scenario())
