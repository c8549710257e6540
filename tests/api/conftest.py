"""A service that answers from a script, and real servers in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from rayapp.api.routes import build_app
from rayapp.api.service import HealthReport, ReplicaHealth, ServiceDescription
from rayapp.engine.answer import Answer
from rayapp.engine.request import (
    GenerationRequest,
    PromptLogprobs,
    Timeline,
    TokenBatch,
    TokenLogprobs,
)
from rayapp.errors import OverloadedError

EOS = 256
ANSWER = "The naïve snowman ☃ says: stop, \U0001f600 done."
MAX_MODEL_LEN = 200


class ScriptedService:
    """Answers every prompt with ``text``; knows what is active and what was cancelled."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.text = ANSWER
        self.batch_size = 1
        self.gap_s = 0.0
        self.errors: dict[int, Exception] = {}
        self.fails: Callable[[GenerationRequest], bool] = lambda request: True
        self.ready = True
        self.full: Exception | None = None
        self.most_admitted = 10**6
        self.ledger: Any = {"totals": {"num_transfers": 0}, "links": [], "recent": []}
        self.requests: list[GenerationRequest] = []
        self.active = self.most_active = 0
        self.cancelled = self.num_sent = 0
        self.description = ServiceDescription(
            model_name="tiny",
            max_model_len=MAX_MODEL_LEN,
            vocab_size=300,
            tokenizer=self.tokenizer,
        )

    def arriving(self, num_answers: int) -> contextlib.AbstractContextManager[None]:
        """Refuse whatever comes while it is full."""
        if self.full is not None:
            raise self.full
        return contextlib.nullcontext()

    def admitted(self, prompts: Any) -> contextlib.AbstractContextManager[None]:
        """Admit answers up to a number."""
        if sum(map(len, prompts)) > self.most_admitted:
            raise OverloadedError("too many at once; ask for fewer", 7)
        return contextlib.nullcontext()

    async def generate(
        self, requests: Sequence[GenerationRequest], timelines: Sequence[Timeline] = ()
    ) -> AsyncGenerator[TokenBatch, None]:
        """Token batches of all answers, which take turns."""
        self.requests.extend(requests)
        self.active += len(requests)
        self.most_active = max(self.most_active, self.active)
        unfinished = {request.request_id: request for request in requests}
        growing = [self._batches(request) for request in requests]
        try:
            for batch in itertools.chain.from_iterable(itertools.zip_longest(*growing)):
                if batch is None:
                    continue
                await asyncio.sleep(self.gap_s)
                request = unfinished[batch.request_id]
                if batch.first_index in self.errors and self.fails(request):
                    raise self.errors[batch.first_index]
                if batch.finish_reason is not None:
                    del unfinished[batch.request_id]
                self.num_sent += 1
                yield batch
        finally:
            self.active -= len(requests)
            self.cancelled += len(unfinished)

    def _batches(self, request: GenerationRequest) -> Iterator[TokenBatch]:
        answer = Answer(request, frozenset({EOS}), self.description.tokenizer)
        tokens: list[int] = []
        index = 0
        for token in [*self.text.encode(), EOS]:
            tokens.append(token)
            reason = answer.take(token)
            if reason or len(tokens) == self.batch_size:
                yield self._batch(request, index, tokens, reason)
                index, tokens = index + len(tokens), []
            if reason:
                return

    def _batch(self, request: Any, index: int, tokens: list[int], reason: Any) -> TokenBatch:
        top = request.sampling.logprobs
        entries = [TokenLogprobs(-0.5, ((t, -0.5), (33, -2.0), (200, -3.0))[:top]) for t in tokens]
        logprobs = () if top is None else tuple(entries)
        of_prompt = () if index else self._prompt_logprobs(request)
        return TokenBatch(request.request_id, 0, index, tuple(tokens), reason, logprobs, of_prompt)

    def _prompt_logprobs(self, request: GenerationRequest) -> PromptLogprobs:
        top = request.sampling.prompt_logprobs
        if top is None:
            return ()
        ids = request.prompt_token_ids
        return (None, *(TokenLogprobs(-t / 8, ((t, -t / 8), (34, -40.0))[:top]) for t in ids[1:]))

    async def health(self) -> HealthReport:
        replica = ReplicaHealth(
            pool="decode",
            replica_id="d0",
            node="node-1",
            parameter_bytes=1234,
            kv_bytes=5678,
            plan_fingerprint="p",
            weights_fingerprint="w",
            dtype="float32",
            num_running=self.active,
        )
        reason = "" if self.ready else "no decode replica answers"
        return HealthReport(ready=self.ready, reason=reason, replicas=(replica,))

    async def counted_elsewhere(self):
        """Nothing: this is the only process."""
        return ()

    async def transfers(self) -> dict[str, Any]:
        if isinstance(self.ledger, Exception):
            raise self.ledger
        return self.ledger

    def wait_idle(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.active and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.active == 0


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """A real uvicorn server on a free port; its base URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture(scope="session")
def serve_app() -> Callable[[Any], contextlib.AbstractContextManager[str]]:
    return serving


@pytest.fixture(scope="session")
def shared(byte_tokenizer) -> Iterator[tuple[ScriptedService, str]]:
    """One server for all tests, because starting and stopping one takes a while."""
    scripted = ScriptedService(byte_tokenizer)
    with serving(build_app(scripted)) as address:
        yield scripted, address


@pytest.fixture
def service(shared) -> Iterator[ScriptedService]:
    scripted, _ = shared
    scripted.reset()
    yield scripted
    scripted.wait_idle()


@pytest.fixture(scope="session")
def clients(shared) -> Iterator[tuple[httpx.Client, openai.OpenAI]]:
    """Made once: each reads all certificates of the system."""
    _, address = shared
    with (
        httpx.Client(base_url=address, timeout=10) as http,
        openai.OpenAI(base_url=address + "/v1", api_key="any", max_retries=0) as client,
    ):
        yield http, client


@pytest.fixture
def http(clients, service) -> httpx.Client:
    return clients[0]


@pytest.fixture
def client(clients, service) -> openai.OpenAI:
    return clients[1]
