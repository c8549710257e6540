"""Random bodies: an answer or a refusal, never a failure of ours."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayapp.api.openai.schema import NEUTRAL
from rayapp.api.routes import build_app

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "tiny", "user", "text", "auto", 0, 1, -1, 2**63, 10**40, "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "include_usage", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
FIELDS = [
    *("model", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed"),
    *("stop", "ignore_eos", "stream", "stream_options", "logprobs", "top_logprobs", "best_of"),
    *("prompt", "messages", "add_special_tokens", "user", *sorted(NEUTRAL)),
]
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": VALUES}),
    min_size=1,
    max_size=2,
)
BODIES = VALUES | st.builds(
    lambda base, extra: {**base, **extra},
    st.fixed_dictionaries({}, optional={"prompt": st.text(max_size=5), "messages": TURNS}),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
)
PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])


@pytest.fixture
def served(service):
    service.text = "ok"
    return build_app(service)


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(path=PATHS, body=BODIES)
def test_no_body_makes_the_server_fail(served, path, body):
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=served, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = json.dumps(body).encode()
            headers = {"content-type": "application/json"}
            return await client.post(path, content=content, headers=headers)

    reply = asyncio.run(post())
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert reply.status_code in (400, 404)
        assert "\n" not in reply.json()["error"]["message"]
    else:
        assert '"error"' not in reply.text
