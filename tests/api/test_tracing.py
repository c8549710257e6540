"""Traces of requests: spans of the phases, their numbers, the client's trace, and no cost."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from rayapp.api.routes import build_app
from rayapp.api.tracing import RequestTraces
from rayapp.engine.request import Timeline, TokenBatch
from rayapp.errors import UnavailableError
from tests.api.in_process import InProcessService

PHASES = ["queue", "prefill", "handoff", "decode"]
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    """A server whose spans are kept in memory."""

    def __init__(self, service, serve_app):
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self._serving = serve_app(build_app(service, traces=RequestTraces(provider)))

    def __enter__(self):
        self.http = httpx.Client(base_url=self._serving.__enter__(), timeout=60)
        return self

    def __exit__(self, *error):
        self.http.close()
        self._serving.__exit__(*error)

    def spans(self, count):
        """All spans once there are ``count``: a request ends shortly after its last byte."""
        until = threading.Event()
        for _ in range(200):
            if len(self.exporter.get_finished_spans()) >= count:
                break
            until.wait(0.02)
        found = self.exporter.get_finished_spans()
        self.exporter.clear()
        return found


@pytest.fixture(scope="module")
def engines(tiny_model, byte_tokenizer):
    service = InProcessService(tiny_model("llama"), byte_tokenizer, max_num_seqs=4)
    yield service
    service.close()


@pytest.fixture(scope="module")
def traced(engines, serve_app):
    with Traced(engines, serve_app) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_span_and_its_phases_are_children_with_the_timelines_numbers(
    traced, stream
):
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True, "stream": stream}
    headers = {"X-Rayapp-Timeline": "1"}
    reply = traced.http.post("/v1/completions", json=body, headers=headers)
    assert reply.status_code == 200
    lines = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: {")]
    choices = [c for line in lines or [reply.text] for c in json.loads(line)["choices"]]
    told = next(choice["timeline"] for choice in choices if "timeline" in choice)
    *phases, request = traced.spans(5)
    assert [span.name for span in phases] == PHASES
    assert (request.name, request.kind) == ("POST /v1/completions", SpanKind.SERVER)
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["gen_ai.usage.input_tokens"] == 3
    assert request.attributes["gen_ai.usage.output_tokens"] == 6
    assert request.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert request.parent is None
    for before, after in itertools.pairwise(phases):
        assert abs(before.end_time - after.start_time) < 1000  # they follow one another
    assert request.start_time <= phases[0].start_time
    assert phases[-1].end_time <= request.end_time
    for span in phases:
        assert span.parent.span_id == request.context.span_id
        seconds = (span.end_time - span.start_time) / 1e9
        assert seconds == pytest.approx(told[f"{span.name}_s"], abs=1e-5)
        assert span.attributes["rayapp.e2e_s"] == pytest.approx(told["e2e_s"])


def test_the_handoff_carries_the_ledgers_record():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    scope = {"type": "http", "path": "/v1/completions", "headers": []}
    trace = RequestTraces(provider).begin(scope)
    record = {"request_id": "the prompt's", "bytes_sent": 1234, "fetch_s": 0.25}
    timeline = Timeline(1.0, 1.5, 2.0, 2.5, 2.0, 4.0, transfer=record)
    observed = []
    observe = trace.watch(lambda *seen: observed.append(seen))
    batches = [TokenBatch("r", 0, 0, (5,)), TokenBatch("r", 0, 1, (6, 7), "length")]
    for batch in batches:
        observe(timeline, batch)
    trace.end()
    assert observed == [(timeline, batch) for batch in batches]
    *phases, request = exporter.get_finished_spans()
    assert request.attributes["gen_ai.usage.output_tokens"] == 3
    for span, seconds in zip(phases, (0.5, 0.5, 0.5, 1.5), strict=True):
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)
        assert span.attributes["rayapp.request_id"] == "r"
        sent = span.attributes.get("rayapp.bytes_sent"), span.attributes.get("rayapp.fetch_s")
        assert sent == ((1234, 0.25) if span.name == "handoff" else (None, None))


def test_the_clients_trace_goes_on_here(traced):
    body = {"prompt": [5, 6, 7], "max_tokens": 2}
    for flags, count in (("01", 5), ("00", 0)):  # a client that samples nothing gets no spans
        headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-{flags}"}
        assert traced.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        spans = traced.spans(count or 1) if count else traced.exporter.get_finished_spans()
        assert len(spans) == count
        for span in spans:
            assert f"{span.context.trace_id:032x}" == TRACE_ID
        if spans:
            assert f"{spans[-1].parent.span_id:016x}" == SPAN_ID


def test_every_answer_of_a_request_has_its_phases(traced):
    body = {"prompt": [[5, 6], [7, 8, 9]], "n": 2, "max_tokens": 3, "ignore_eos": True}
    assert traced.http.post("/v1/completions", json=body).status_code == 200
    *phases, request = traced.spans(17)
    assert len(phases) == 4 * 4
    assert len({span.attributes["rayapp.request_id"] for span in phases}) == 4
    assert request.attributes["gen_ai.usage.output_tokens"] == 12


def test_failures_and_refusals_are_told(shared, serve_app):
    service, _ = shared
    service.reset()
    with Traced(service, serve_app) as running:
        service.errors = {0: UnavailableError("no replica")}
        assert running.http.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        assert running.http.post("/v1/completions", json={"n": 0}).status_code == 400
        assert running.http.get("/health").status_code == 200
        failed, refused = running.spans(2)
    assert failed.attributes["http.response.status_code"] == 503
    assert failed.status.status_code == StatusCode.ERROR
    assert refused.attributes["http.response.status_code"] == 400
    assert refused.status.status_code == StatusCode.UNSET


def test_without_configuration_nothing_is_imported():
    code = (
        "import os, sys; from rayapp.api.routes import build_app; "
        "from rayapp.api.tracing import RequestTraces; "
        "assert RequestTraces.configured() is None; "
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter'); "  # FastAPI imports the interface
        "assert not any(name.startswith(heavy) for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SERVICE_NAME": "mine"},
    ],
)
def test_what_asks_for_no_traces(environ):
    assert RequestTraces.configured(environ) is None


def test_a_package_that_lacks_is_named_and_the_service_goes_without(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    with caplog.at_level("WARNING"):
        assert RequestTraces.configured(endpoint) is None
    assert "rayapp[telemetry]" in caplog.text


def test_spans_reach_the_endpoint_of_the_environment(engines, serve_app, monkeypatch):
    pytest.importorskip(
        "opentelemetry.exporter.otlp.proto.http",
        reason="the exporter is not installed: pip install 'rayapp[telemetry]'",
    )
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["content-length"])
            received.append((self.path, self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    traces = RequestTraces.configured()
    with (
        serve_app(build_app(engines, traces=traces)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        assert http.post("/v1/completions", json={"prompt": [5], "max_tokens": 3}).is_success
        for _ in range(200):
            if b"handoff" in b"".join(body for _, body in received):
                break
            threading.Event().wait(0.05)
    collector.shutdown()
    collector.server_close()
    assert {path for path, _ in received} == {"/v1/traces"}
    content = b"".join(body for _, body in received)
    assert all(name.encode() in content for name in (*PHASES, "POST /v1/completions", "rayapp"))
