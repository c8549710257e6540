"""A client of a running service that notes when the pieces of an answer arrive."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator

import httpx


class Asker:
    """A client that asks random token ids and notes when the pieces of the answer arrive."""

    def __init__(self, client: httpx.Client, model: str, rng: random.Random) -> None:
        self._client, self._model, self._rng = client, model, rng

    def times(self, num_prompt: int, num_answer: int) -> list[float]:
        """Seconds from the request to every piece of its answer."""
        return list(self.pieces(num_prompt, num_answer))

    def pieces(self, num_prompt: int, num_answer: int) -> Iterator[float]:
        body = {
            "model": self._model,
            "prompt": [self._rng.randrange(10, 250) for _ in range(num_prompt)],
            "max_tokens": num_answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        began_s = time.monotonic()
        with self._client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]" and json.loads(data)["choices"]:
                    yield time.monotonic() - began_s
