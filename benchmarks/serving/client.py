"""A client of OpenAI-compatible servers that notes when the tokens of its answers arrive."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from rayapp.simulation.traces import Arrival


@dataclass(frozen=True)
class Server:
    """A server under load.

    ``takes_text`` is set for servers that read texts only and know no ``ignore_eos``; they get
    transformers' own ``generation_config`` instead, which ends answers by their length alone.
    ``is_ours`` is set for services of this script, whose processes it can look at.
    """

    name: str
    url: str
    model: str
    takes_text: bool = False
    is_ours: bool = False


@dataclass(frozen=True)
class Reply:
    """One answer: seconds from sending the request, and the tokens that the server counted.

    ``gaps_s`` are the seconds between its pieces, each of which holds a token or more.
    ``first_s`` is None if no text came. ``num_counted`` is None where a server counts nothing, and
    ``error`` says why an answer failed. ``text`` is all of it.
    """

    num_answer: int
    first_s: float | None
    last_s: float
    num_counted: int | None = None
    error: str | None = None
    gaps_s: tuple[float, ...] = ()
    text: str = ""

    @property
    def per_token_s(self) -> float | None:
        """Seconds per token after the first (TPOT), from the time between first and last."""
        if self.first_s is None or self.num_answer < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_answer - 1)


class Client:
    """Asks one server for answers to random prompts, all of them with a length fixed beforehand.

    Args:
        server: The server to ask.
        tokenizer: The model's tokenizer, which makes texts of random tokens.
        seed: Seed of the prompts: every server gets the same ones.
        timeout_s: Longest silence of the server.
    """

    def __init__(
        self, server: Server, tokenizer: PreTrainedTokenizerBase, seed: int, timeout_s: float
    ) -> None:
        self._server = server
        self._tokenizer = tokenizer
        self._seed = seed
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=timeout_s, limits=limits)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def open_loop(self, arrivals: Sequence[Arrival]) -> list[Reply]:
        """Send every request at its time, whatever became of the earlier ones."""
        began_s = time.monotonic()

        async def one(number: int, arrival: Arrival) -> Reply:
            await asyncio.sleep(began_s + arrival.at_s - time.monotonic())
            return await self.ask(number, arrival.num_prompt, arrival.num_answer)

        return await asyncio.gather(*(one(*pair) for pair in enumerate(arrivals)))

    async def closed_loop(self, arrivals: Sequence[Arrival], num_streams: int) -> list[Reply]:
        """Send the next request whenever one of ``num_streams`` has been answered."""
        waiting = iter(enumerate(arrivals))
        replies: list[Reply] = []

        async def stream() -> None:
            for number, arrival in waiting:
                replies.append(await self.ask(number, arrival.num_prompt, arrival.num_answer))

        await asyncio.gather(*(stream() for _ in range(num_streams)))
        return replies

    async def ask(self, number: int, num_prompt: int, num_answer: int) -> Reply:
        """Ask for an answer to prompt ``number``; errors are part of the reply."""
        body = self._body(number, num_prompt, num_answer)
        began_s, first_s, counted = time.monotonic(), None, None
        error: str | None = None
        last_s, gaps_s, texts = 0.0, [], []
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    error = f"{answer.status_code}: {(await answer.aread())[:200]!r}"
                async for line in answer.aiter_lines():
                    event = _event(line)
                    if event is None:
                        continue
                    error = error or (str(event["error"]) if event.get("error") else None)
                    counted = (event.get("usage") or {}).get("completion_tokens", counted)
                    if event.get("choices"):
                        before_s, last_s = last_s, time.monotonic() - began_s
                        texts.append(event["choices"][0].get("text") or "")
                        if first_s is None:
                            first_s = last_s
                        else:
                            gaps_s.append(last_s - before_s)
        except httpx.HTTPError as failure:
            error = repr(failure)
        text = "".join(texts)
        return Reply(num_answer, first_s, last_s, counted, error, tuple(gaps_s), text)

    def _body(self, number: int, num_prompt: int, num_answer: int) -> dict[str, Any]:
        rng = random.Random(f"{self._seed}-{number}")
        # The lowest ids of a vocabulary are often special tokens.
        ids = [rng.randrange(10, len(self._tokenizer) - 10) for _ in range(num_prompt)]
        body = {
            "model": self._server.model,
            "prompt": ids,
            "max_tokens": num_answer,
            "temperature": 0,
            "stream": True,
        }
        if self._server.takes_text:
            limits = {"max_new_tokens": num_answer, "do_sample": False}
            text = self._tokenizer.decode(ids)
            return {**body, "prompt": text, "generation_config": json.dumps(limits)}
        return {**body, "ignore_eos": True, "stream_options": {"include_usage": True}}


def _event(line: str) -> dict[str, Any] | None:
    """The content of one line of a stream of events; None if it has none."""
    data = line.removeprefix("data:").strip()
    if line.startswith("data:") and data != "[DONE]":
        content: dict[str, Any] = json.loads(data)
        return content
    return None
