"""A client that leaves frees the resources of its request, in whatever phase it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time

import pytest

from rayapp.api.disconnect import EventStream
from rayapp.api.openai.answers import Delta, merged

BODY = {"prompt": ["a", "b"], "n": 2, "max_tokens": 12}


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@contextlib.contextmanager
def posting(http, service, body):
    """A client that asked, whose four answers are under way, and who leaves at the end."""
    content = json.dumps(body).encode()
    address = (http.base_url.host, http.base_url.port)
    with socket.create_connection(address) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
            + f"content-length: {len(content)}\r\n\r\n".encode()
            + content
        )
        wait_for(lambda: service.active == 4)
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_token(http, service, stream):
    service.gap_s = 30.0
    with posting(http, service, {**BODY, "stream": stream}):
        pass
    wait_for(lambda: service.cancelled == 4)


def test_leaving_in_the_middle_of_a_stream(http, service):
    service.gap_s = 0.3
    with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as reply:
        next(reply.iter_lines())
    wait_for(lambda: service.cancelled == 4)


def test_leaving_while_the_whole_answer_grows(http, service):
    service.gap_s = 0.3
    with posting(http, service, BODY):
        wait_for(lambda: service.num_sent >= 4)
    wait_for(lambda: service.cancelled == 4)


def test_a_silent_client_that_stays_is_served(http, service):
    service.gap_s = 0.05
    assert http.post("/v1/completions", json=BODY).status_code == 200
    assert service.cancelled == 0


def test_leaving_between_the_first_token_and_the_response(service):
    """The stream's source ends even where its events never began."""
    closed = []

    async def source():
        try:
            while True:
                yield Delta(0, "x", (1,))
                await asyncio.sleep(0.01)
        finally:
            closed.append(True)

    async def events():
        yield b""

    async def scenario():
        deltas = merged([source()])
        await anext(deltas)

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.sleep(10)

        response = EventStream(events(), source=deltas)
        await asyncio.wait_for(response({"type": "http"}, receive, send), 5)

    asyncio.run(scenario())
    assert closed == [True]


def test_cancelling_the_handler_itself_frees_everything(service):
    """Ray Serve cancels the handler when a client leaves."""
    from rayapp.api.disconnect import unless_disconnected
    from rayapp.api.openai.answers import answer_deltas
    from rayapp.engine.request import GenerationRequest
    from rayapp.engine.sampling_params import SamplingParams

    service.gap_s = 30.0
    request = GenerationRequest("r", (1,), SamplingParams())

    async def receive():
        await asyncio.sleep(60)

    async def scenario():
        deltas = merged([answer_deltas(service, [request], 0, [lambda *_: None])])

        async def first():
            return await anext(deltas)

        task = asyncio.create_task(unless_disconnected(receive, first()))
        await asyncio.sleep(0.05)
        assert service.active == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.active == 0

    asyncio.run(scenario())
