"""Traces for OpenTelemetry: a span per request, with child spans of its phases.

They are made of timelines once a request has ended, so tokens cost no more than a count. Without
configuration nothing of this runs, and OpenTelemetry's SDK is not even imported.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayapp.engine.request import Timeline, TokenBatch

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

TRACED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_STATE = "trace"
Observer = Callable[[Timeline, TokenBatch], None]


@dataclass
class _Watched:
    """One answer of a request, as far as it has come."""

    request_id: str = ""
    timeline: Timeline | None = None
    num_tokens: int = 0
    finish_reason: str = ""


class RequestTrace:
    """The trace of one request while it is answered.

    Args:
        tracer: OpenTelemetry's tracer.
        scope: The ASGI scope of the request, whose ``traceparent`` names the span above.
    """

    def __init__(self, tracer: Any, scope: Scope) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._answers: list[_Watched] = []
        self._span = tracer.start_span(
            f"POST {scope['path']}",
            context=TraceContextTextMapPropagator().extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": scope["path"]},
        )

    def begin(self, model_name: str, num_prompt_tokens: int) -> None:
        """Note the model and the length of the prompts, once they are tokenized."""
        self._span.set_attribute("gen_ai.request.model", model_name)
        self._span.set_attribute("gen_ai.usage.input_tokens", num_prompt_tokens)

    def watch(self, observe: Observer) -> Observer:
        """An observer of one answer that this trace learns from, too."""
        answer = _Watched()
        self._answers.append(answer)

        def watched(timeline: Timeline, batch: TokenBatch) -> None:
            observe(timeline, batch)
            answer.request_id, answer.timeline = batch.request_id, timeline
            answer.num_tokens += len(batch.token_ids)
            answer.finish_reason = batch.finish_reason or answer.finish_reason

        return watched

    def note_status(self, status: int) -> None:
        """Note the response's HTTP status."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """End the span; the phases of all answers that have begun become its children."""
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(self._span)
        num_tokens = sum(answer.num_tokens for answer in self._answers)
        self._span.set_attribute("gen_ai.usage.output_tokens", num_tokens)
        reasons = [answer.finish_reason for answer in self._answers if answer.finish_reason]
        self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
        # All marks of a timeline are on the monotonic clock, and spans on that of the day.
        offset_ns = time.time_ns() - time.monotonic_ns()
        for answer in self._answers:
            if answer.timeline is not None:
                self._add_phases(answer, answer.timeline, inside, offset_ns)
        self._span.end()

    def _add_phases(
        self, answer: _Watched, timeline: Timeline, inside: Any, offset_ns: int
    ) -> None:
        """Add a span for every phase whose end is known."""
        numbers = {f"rayapp.{name}": value for name, value in timeline.intervals().items()}
        sent = {f"rayapp.{name}": value for name, value in (timeline.transfer or {}).items()}
        for name, (begin_s, end_s) in timeline.phases().items():
            span = self._tracer.start_span(
                name,
                context=inside,
                start_time=offset_ns + int(begin_s * 1e9),
                attributes={
                    **(sent if name == "handoff" else {}),
                    **numbers,
                    "rayapp.request_id": answer.request_id,
                    "rayapp.num_tokens": answer.num_tokens,
                },
            )
            span.end(end_time=offset_ns + int(end_s * 1e9))


class RequestTraces:
    """Makes the traces of all requests of this process.

    Args:
        provider: OpenTelemetry's provider, with whatever its spans are exported by.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("rayapp")

    @classmethod
    def configured(cls, environ: Mapping[str, str] = os.environ) -> RequestTraces | None:
        """The traces that OpenTelemetry's own variables ask for; None if they ask for none.

        An endpoint or ``OTEL_TRACES_EXPORTER`` (``otlp`` or ``console``) asks for them. Without the
        packages that this takes, a warning is logged, and the service goes without.
        """
        endpoint = next(filter(None, map(environ.get, _ENDPOINTS)), None)
        exporter = environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
        if exporter == "none" or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        try:
            return cls(_provider(exporter, environ))
        except ImportError as error:
            logger.warning(
                "no traces: OpenTelemetry is configured, but lacks a package (%s); install "
                "rayapp[telemetry]",
                error,
            )
            return None

    def begin(self, scope: Scope) -> RequestTrace:
        """Begin the trace of one request."""
        return RequestTrace(self._tracer, scope)


def _provider(exporter: str, environ: Mapping[str, str]) -> TracerProvider:
    """A provider as the environment wants it; everything else of it reads its own variables."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    named = {} if environ.get("OTEL_SERVICE_NAME") else {"service.name": "rayapp"}
    provider = TracerProvider(resource=Resource.create(named))
    if exporter == "console":
        exporting: Any = ConsoleSpanExporter()
    else:
        protocol = next(filter(None, map(environ.get, _PROTOCOLS)), "http/protobuf")
        kind = "grpc" if protocol == "grpc" else "http"
        module = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter")
        exporting = module.OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporting))
    return provider


def trace_of(scope: Scope) -> RequestTrace | None:
    """The trace of a request; None if it has none."""
    trace: RequestTrace | None = scope.get("state", {}).get(_STATE)
    return trace


class TraceRequests:
    """ASGI layer that traces requests for answers, from their arrival to their last byte."""

    def __init__(self, app: ASGIApp, traces: RequestTraces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the app within a span; other requests pass without one."""
        if scope["type"] != "http" or scope["path"] not in TRACED_PATHS:
            await self._app(scope, receive, send)
            return
        trace = self._traces.begin(scope)
        scope.setdefault("state", {})[_STATE] = trace

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.note_status(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            trace.end()
