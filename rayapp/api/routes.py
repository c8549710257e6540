"""The HTTP interface: OpenAI's routes and our own, over a service that streams tokens."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from rayapp import __version__
from rayapp.api.access import LimitBody, RequireKey, is_authorized
from rayapp.api.disconnect import EventStream, unless_disconnected
from rayapp.api.document import document
from rayapp.api.metrics import ApiMetrics, CountResponses
from rayapp.api.openai.answers import (
    BatchObserver,
    Delta,
    admitted_together,
    answer_deltas,
    collected,
    merged,
)
from rayapp.api.openai.prompts import Prompt, PromptReader
from rayapp.api.openai.replies import (
    ChatFormat,
    CompletionFormat,
    EchoedPrompt,
    Reply,
    ReplyFormat,
)
from rayapp.api.openai.schema import (
    MAX_BODY_BYTES,
    MAX_BODY_BYTES_WITH_IMAGES,
    AnswerRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from rayapp.api.refusals import install_error_handlers
from rayapp.api.service import HealthReport, Service
from rayapp.api.status_page import status_page
from rayapp.api.tracing import RequestTraces, TraceRequests, trace_of
from rayapp.engine.request import GenerationRequest
from rayapp.errors import NotFoundError, RayappError, RequestError
from rayapp.plan import VisualTokens
from rayapp.vision.selection import check_rule

DEFAULT_COMPLETION_TOKENS = 16
TIMELINE_HEADER = "X-Rayapp-Timeline"
"""A request with this header gets the timeline of every answer with its last choice."""
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_app(
    service: Service,
    *,
    key_digest: str | None = None,
    max_body_bytes: int | None = None,
    metrics: ApiMetrics | None = None,
    traces: RequestTraces | None = None,
) -> FastAPI:
    """An ASGI app over ``service``, with no state outside itself.

    Args:
        service: The source of tokens.
        key_digest: :func:`rayapp.api.access.digest_of` the key. Without it every caller is served;
            with it, only ``/health`` is open.
        max_body_bytes: Larger request bodies are refused; None takes a default that is larger for a
            model that takes images.
        metrics: Counters that somebody else reads too; None makes new ones.
        traces: OpenTelemetry's traces of requests; None makes none.
    """
    if max_body_bytes is None:
        takes_images = service.description.images is not None
        max_body_bytes = MAX_BODY_BYTES_WITH_IMAGES if takes_images else MAX_BODY_BYTES
    app = FastAPI(title="rayapp", version=__version__, docs_url=None, redoc_url=None)
    metrics = metrics or ApiMetrics()
    answers, views = AnswerRoutes(service, metrics), ViewRoutes(service, metrics, key_digest)
    app.add_api_route("/v1/completions", answers.completions, methods=["POST"], response_model=None)
    app.add_api_route(
        "/v1/chat/completions", answers.chat_completions, methods=["POST"], response_model=None
    )
    app.add_api_route("/tokenize", answers.tokenize, methods=["POST"], response_model=None)
    app.add_api_route("/detokenize", answers.detokenize, methods=["POST"], response_model=None)
    for path, view in (
        ("/v1/models", views.models),
        ("/v1/models/{name:path}", views.model),
        ("/v1/transfers", views.transfers),
        ("/health", views.health),
        ("/metrics", views.metrics),
        ("/", views.page),
    ):
        app.add_api_route(path, view, methods=["GET"], response_model=None)
        app.add_api_route(
            path, view, methods=["HEAD"], response_model=None, include_in_schema=False
        )
    document(app)
    install_error_handlers(app)
    app.add_middleware(LimitBody, max_bytes=max_body_bytes)
    if key_digest is not None:
        app.add_middleware(RequireKey, key_digest=key_digest)
    app.add_middleware(CountResponses, metrics=metrics)
    if traces is not None:
        app.add_middleware(TraceRequests, traces=traces)
    return app


class AnswerRoutes:
    """Routes that take prompts.

    Args:
        service: The source of tokens.
        metrics: The counters of this app.
    """

    def __init__(self, service: Service, metrics: ApiMetrics) -> None:
        self._service = service
        self._metrics = metrics
        self._served = service.description
        self._prompts = PromptReader(
            self._served.tokenizer, self._served.images, model_name=self._served.model_name
        )

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        self._check_model(body.model)
        with self._service.arriving(len(body.prompts) * body.n):
            prompts = (
                await self._prompts.texts([str(prompt) for prompt in body.prompts])
                if isinstance(body.prompts[0], str)
                else [Prompt(tuple(map(int, prompt))) for prompt in body.prompts]
            )
        requests = self._requests(body, prompts, default=DEFAULT_COMPLETION_TOKENS)
        wants_logprobs = body.num_top_logprobs is not None
        echoed = await self._echoed(body, prompts) if body.echo else ()
        form = CompletionFormat(self._served.tokenizer, logprobs=wants_logprobs, echoed=echoed)
        return await self._answer(body, request, requests, form, prefix="cmpl-")

    async def _echoed(
        self, body: CompletionRequest, prompts: Sequence[Prompt]
    ) -> list[EchoedPrompt]:
        """The prompt of every choice, as the client wrote it."""
        texts = [
            given if isinstance(given, str) else await self._prompts.text(given)
            for given in body.prompts
        ]
        return [
            EchoedPrompt(text, prompt.token_ids)
            for text, prompt in zip(texts, prompts, strict=True)
            for _ in range(body.n)
        ]

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check_model(body.model)
        rule = body.visual_tokens
        if rule is not None:
            check_rule(rule)
        with self._service.arriving(body.n):
            prompts = [await self._prompts.chat(body.messages)]
        requests = self._requests(body, prompts, default=self._served.max_model_len, rule=rule)
        form = ChatFormat(self._served.tokenizer, logprobs=body.logprobs)
        return await self._answer(body, request, requests, form, prefix="chatcmpl-")

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Return the token ids of a prompt, with all tokens of its images."""
        self._check_model(body.model)
        if body.messages is not None:
            prompt = await self._prompts.chat(body.messages)
        else:
            (prompt,) = await self._prompts.texts(
                [body.prompt or ""], add_special_tokens=body.add_special_tokens
            )
        tokens, limit = self._prompts.expanded(prompt), self._served.max_model_len
        return {"count": len(tokens), "max_model_len": limit, "tokens": tokens}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        """Return the text of token ids, special tokens included, so that it undoes tokenizing."""
        self._check_model(body.model)
        wrong = next((t for t in body.tokens if not 0 <= t < self._served.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is not in the vocabulary; ids lie in "
                f"0..{self._served.vocab_size - 1}"
            )
        return {"prompt": await self._prompts.text(body.tokens)}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._served.model_name:
            raise NotFoundError(
                f"model `{name}` is not served here; ask for `{self._served.model_name}`"
            )

    def _requests(
        self,
        body: AnswerRequest,
        prompts: Sequence[Prompt],
        *,
        default: int,
        rule: VisualTokens | None = None,
    ) -> list[list[GenerationRequest]]:
        """The requests of every prompt, one per answer; all are checked before any begins.

        Args:
            body: The request's parameters.
            prompts: The tokenized prompts.
            default: Limit of answer tokens if the client sent none; cut to the room that is left.
            rule: Rule for visual tokens that replaces the plan's.
        """
        limit, requests = self._served.max_model_len, []
        for prompt in prompts:
            room = limit - prompt.num_tokens
            if room < 1:
                raise RequestError(
                    f"the prompt has {prompt.num_tokens} tokens, but this model serves at most "
                    f"{limit} tokens of prompt and answer together; shorten the prompt"
                )
            answers = [
                GenerationRequest(
                    uuid.uuid4().hex,
                    prompt.token_ids,
                    sampling,
                    images=prompt.images,
                    text_token_ids=prompt.text_token_ids,
                    visual_tokens=rule,
                )
                for sampling in body.sampling(body.answer_limit or min(default, room))
            ]
            self._served.check(answers[0])  # The answers differ in their seeds only.
            requests.append(answers)
        return requests

    async def _answer(
        self,
        body: AnswerRequest,
        request: Request,
        requests: list[list[GenerationRequest]],
        form: ReplyFormat,
        *,
        prefix: str,
    ) -> Response:
        """Run all requests; the status waits for the first token, which may be an error."""
        num_prompt_tokens = sum(answers[0].num_prompt_tokens for answers in requests)
        observers = self._observers(request, requests, num_prompt_tokens)
        reply = Reply(
            prefix + uuid.uuid4().hex,
            self._served.model_name,
            form,
            num_prompt_tokens,
            with_timelines=TIMELINE_HEADER in request.headers,
        )
        deltas = merged(
            [
                answer_deltas(self._service, answers, number * body.n, observers[number])
                for number, answers in enumerate(requests)
            ]
        )
        if len(requests) > 1:  # One alone is admitted when it begins, which costs tokens nothing.
            deltas = admitted_together(self._service, requests, deltas)
        self._metrics.count_prompt(num_prompt_tokens)
        if not body.stream:
            work = collected(deltas, len(requests) * body.n)
            return JSONResponse(reply.whole(await unless_disconnected(request.receive, work)))
        first = await unless_disconnected(request.receive, _first(deltas))
        events = reply.events(first, deltas, with_usage=body.includes_usage)
        return EventStream(events, source=deltas)

    def _observers(
        self, request: Request, requests: list[list[GenerationRequest]], num_prompt_tokens: int
    ) -> list[list[BatchObserver]]:
        """An observer of every answer, by prompt."""
        trace = trace_of(request.scope)
        if trace is None:
            return [[self._metrics.answer_observer() for _ in answers] for answers in requests]
        trace.begin(self._served.model_name, num_prompt_tokens)
        return [
            [trace.watch(self._metrics.answer_observer()) for _ in answers] for answers in requests
        ]


async def _first(deltas: Any) -> Delta:
    """Return the first delta; a stream without one has raised an error."""
    delta: Delta = await anext(deltas)
    return delta


class ViewRoutes:
    """Routes that only read the state of the service.

    Args:
        service: The service whose state is shown.
        metrics: The counters of this process.
        key_digest: The key's digest; without the key, ``/health`` shows only whether all is well.
    """

    def __init__(self, service: Service, metrics: ApiMetrics, key_digest: str | None) -> None:
        self._service = service
        self._metrics = metrics
        self._key_digest = key_digest
        self._served = service.description

    async def models(self) -> dict[str, Any]:
        """List the served model, the only one."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the served model if it has this name."""
        if name != self._served.model_name:
            raise NotFoundError(
                f"model `{name}` is not served here; ask for `{self._served.model_name}`"
            )
        return self._card()

    async def transfers(self) -> JSONResponse:
        """Return the ledger of KV transfers."""
        return JSONResponse(await self._service.transfers())

    async def health(self, request: Request) -> JSONResponse:
        """Answer 200 once every pool answers, else 503; details of replicas need the key."""
        report = await self._service.health()
        content: dict[str, Any] = {"ready": report.ready, "reason": report.reason}
        if is_authorized(request.headers, self._key_digest):
            content |= self._details(report)
        return JSONResponse(content, status_code=200 if report.ready else 503)

    async def metrics(self) -> Response:
        """Return the metrics as Prometheus text."""
        text = self._metrics.render(
            await self._service.health(),
            await self._ledger(),
            await self._service.counted_elsewhere(),
        )
        return Response(text, media_type=_METRICS_TYPE)

    async def page(self) -> HTMLResponse:
        """Return the status page, for people."""
        health = await self._service.health()
        return HTMLResponse(status_page(self._served, health, await self._ledger()))

    async def _ledger(self) -> dict[str, Any] | None:
        try:
            return await self._service.transfers()
        except RayappError:
            return None

    def _details(self, report: HealthReport) -> dict[str, Any]:
        pools = {
            pool: [replica.model_dump(mode="json") for replica in replicas]
            for pool, replicas in report.pools().items()
        }
        return {
            "model": self._served.model_name,
            "mode": self._served.mode,
            "plan_fingerprint": self._served.plan.fingerprint,
            "pools": pools,
        }

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._served.model_name,
            "object": "model",
            "created": self._served.created,
            "owned_by": "rayapp",
            "max_model_len": self._served.max_model_len,
        }
