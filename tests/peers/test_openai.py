"""OpenAI's own client, as its users call it: every call comes back in the client's own types."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import sys

from openai import BadRequestError, NotFoundError, OpenAI

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="any", max_retries=0)
(model,) = client.models.list()
assert client.models.retrieve(model.id).id == model.id

asked = {"model": model.id, "prompt": "once upon", "max_tokens": 12, "temperature": 0.8, "seed": 3}
whole = client.completions.create(**asked, n=2, logprobs=2)
assert [choice.index for choice in whole.choices] == [0, 1]
assert whole.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in whole.choices)
assert client.completions.create(**asked).choices[0].text == whole.choices[0].text

parts = list(
    client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
)
assert "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text
assert parts[-1].usage.completion_tokens > 0
assert not parts[-1].choices

echo = client.completions.create(
    model=model.id, prompt=[5, 6, 7], max_tokens=1, temperature=0, echo=True, logprobs=1
)
assert len(echo.choices[0].logprobs.token_logprobs) == 4
assert echo.choices[0].logprobs.token_logprobs[0] is None

stop = whole.choices[0].text[2:4]
stopped = client.completions.create(**asked, stop=[stop])
assert stop not in stopped.choices[0].text

for wrong in ({"model": "none"}, {"model": model.id, "n": 999}):
    try:
        client.completions.create(prompt="a", **wrong)
    except (BadRequestError, NotFoundError) as error:
        assert error.body["message"]
    else:
        raise AssertionError(wrong)

messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
chat = client.chat.completions.create(
    model=model.id, messages=messages, max_completion_tokens=6, logprobs=True, top_logprobs=2
)
assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
with client.chat.completions.stream(model=model.id, messages=messages, max_tokens=6) as stream:
    kinds = {event.type for event in stream}
assert "chunk" in kinds
print("all is well")
"""


def test_completions_chat_and_errors(peer, address, tmp_path):
    script = tmp_path / "ask.py"
    script.write_text(SCRIPT)
    assert "all is well" in peer("openai", "python", script, address, cwd=tmp_path)
