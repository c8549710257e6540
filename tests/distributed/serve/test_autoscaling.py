"""Both pools grow under load and shrink after it, and no request fails."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]


@pytest.fixture
def service(elastic):
    return elastic


class Load:
    """Clients that ask one request after the other until told to stop; keeps every status."""

    def __init__(self, url: str, num_clients: int, prompt_tokens: int, max_tokens: int) -> None:
        self.codes: list[int] = []
        self._body = {
            "model": "tested", "prompt": [7] * prompt_tokens, "max_tokens": max_tokens,
            "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.is_set():
                answer = client.post("/v1/completions", json=self._body)
                self.codes.append(answer.status_code)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pool", "prompt_tokens", "max_tokens"), [("prefill", 500, 1), ("decode", 5, 100)]
)
def test_a_pool_grows_under_load_and_shrinks_after_it(service, pool, prompt_tokens, max_tokens):
    """Long prompts with one answer token load prefill alone, long answers decode."""
    service.wait_for(pool, {1})
    with Load(service.settings.url, 16, prompt_tokens, max_tokens) as load:
        service.wait_for(pool, {2}, within_s=150)
        before, until_s = len(load.codes), time.monotonic() + 60
        while len(load.codes) == before:
            assert time.monotonic() < until_s, "no answer while a second replica is there"
            time.sleep(0.1)
    service.wait_for(pool, {1}, within_s=90)
    assert set(load.codes) == {200}
    service.check_idle()
