"""Streams of answers, from an ASGI app in this process or over HTTP, and what CPU they take."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from rayapp.api.openai.replies import DONE

_ENDS_LEFT_OUT = 8
"""Tokens at the ends of every answer that are not measured: requests begin and end there."""

_TEXT = b'"text":"'


@dataclass
class Span:
    """Between the moments when all streams have begun and the first one ends."""

    num_streams: int
    num_tokens: int
    counts: list[int] = field(default_factory=list)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.counts = [0] * self.num_streams

    def count(self, stream: int, event: bytes) -> None:
        """Count the tokens of an event of a stream: the letters of its text."""
        begin = event.find(_TEXT) + len(_TEXT)
        self.counts[stream] += event.find(b'"', begin) - begin
        if not self.began.is_set() and min(self.counts) >= _ENDS_LEFT_OUT:
            self.began.set()
        if self.counts[stream] >= self.num_tokens - _ENDS_LEFT_OUT:
            self.ended.set()


def cpu_s(pids: dict[str, int]) -> dict[str, float]:
    """Seconds of CPU that processes have used, by name."""
    times = {name: psutil.Process(pid).cpu_times() for name, pid in pids.items()}
    return {name: spent.user + spent.system for name, spent in times.items()}


async def _measured(span: Span, pids: dict[str, int]) -> dict[str, float]:
    """Tokens, seconds, and every process's seconds of CPU within a span."""
    await span.began.wait()
    tokens, at_s, before = sum(span.counts), time.monotonic(), cpu_s(pids)
    await span.ended.wait()
    after = cpu_s(pids)
    found = {f"{name}_cpu_s": after[name] - before[name] for name in pids}
    return {"tokens": sum(span.counts) - tokens, "wall_s": time.monotonic() - at_s, **found}


async def from_app(app: Any, span: Span, pids: dict[str, int]) -> dict[str, float]:
    """Run the streams of a span on an app, and return what they cost up to ASGI's ``send``."""
    return await _spent(span, pids, [_from_app(app, span, n) for n in range(span.num_streams)])


async def over_http(url: str, span: Span, pids: dict[str, int]) -> dict[str, float]:
    """Run the streams of a span over HTTP, and return what they cost the server."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client:
        return await _spent(
            span, pids, [_over_http(client, span, n) for n in range(span.num_streams)]
        )


async def _over_http(client: httpx.AsyncClient, span: Span, number: int) -> None:
    body = request_body(span.num_tokens)
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                span.count(number, line.encode())
    _check(span, number)


def _check(span: Span, number: int) -> None:
    if span.counts[number] != span.num_tokens:
        raise AssertionError(f"stream {number} has {span.counts[number]} of {span.num_tokens}")


async def _spent(
    span: Span, pids: dict[str, int], streams: list[Coroutine[Any, Any, None]]
) -> dict[str, float]:
    measuring = asyncio.ensure_future(_measured(span, pids))
    await asyncio.gather(*streams)
    return await measuring


async def _from_app(app: Any, span: Span, number: int) -> None:
    body = json.dumps(request_body(span.num_tokens)).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        event = message.get("body", b"")
        if event and event != DONE:
            span.count(number, event)

    headers = [(b"content-type", b"application/json"), (b"host", b"here")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "root_path": "", "headers": headers, "client": ("here", 1),
        "server": ("here", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    _check(span, number)


def request_body(num_tokens: int) -> dict[str, Any]:
    """The body of one stream's request."""
    return {
        "prompt": [104, 101, 121], "max_tokens": num_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
