"""The views of a server: models, ledger, health, metrics, the status page."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rayapp.api.routes import build_app
from rayapp.api.service import HealthReport, ServiceDescription
from rayapp.api.status_page import readable_bytes, status_page
from rayapp.errors import UnavailableError
from rayapp.plan import ModelSignature, PruningPlan

LINK = {
    "num_transfers": 3,
    "bytes_full": 4000,
    "bytes_sent": 1000,
    "overhead_bytes": 64,
    "saved_by_visual_tokens_bytes": 0,
    "saved_by_blocks_bytes": 2064,
    "saved_by_tokens_bytes": 500,
    "saved_by_encoding_bytes": 500,
    "put_s": 0.25,
    "fetch_s": 0.5,
    "reduction_factor": 4.0,
}


def samples(text):
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def fresh(service, serve_app):
    """A client of a server that has counted nothing yet."""
    with serve_app(build_app(service)) as url, httpx.Client(base_url=url) as http:
        yield http


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.object) == ("tiny", "rayapp", "model")
    assert client.models.retrieve("tiny") == model


def test_health(http, service):
    reply = http.get("/health")
    assert reply.status_code == 200
    assert reply.json()["pools"]["decode"][0]["parameter_bytes"] == 1234
    assert http.head("/health").status_code == 200
    service.ready = False
    reply = http.get("/health")
    assert reply.status_code == 503
    assert reply.json()["reason"] == "no decode replica answers"


def test_transfers(http, service):
    assert http.get("/v1/transfers").json() == service.ledger
    service.ledger = UnavailableError("no ingress answers")
    assert http.get("/v1/transfers").status_code == 503


def test_metrics_count_what_happened(fresh, service):
    http = fresh
    service.ledger = {"totals": LINK, "links": [], "recent": []}
    http.post("/v1/completions", json={"prompt": "abc", "n": 2, "max_tokens": 5})
    http.post("/v1/completions", json={"prompt": "abc", "n": 99})
    assert http.head("/metrics").status_code == 200
    found = samples(http.get("/metrics").text)
    assert found["rayapp_prompt_tokens_total", ()] == 3
    assert found["rayapp_generation_tokens_total", ()] == 10
    assert found["rayapp_request_success_total", (("finished_reason", "length"),)] == 2
    assert found["rayapp_time_to_first_token_seconds_count", ()] == 2
    assert found["rayapp_inter_token_latency_seconds_count", ()] == 8
    assert found["rayapp_request_time_per_output_token_seconds_count", ()] == 2
    assert found["rayapp_e2e_request_latency_seconds_count", ()] == 2
    for status, count in (("200", 1), ("400", 1)):
        labels = (("path", "/v1/completions"), ("status", status))
        assert found["rayapp_http_responses_total", labels] == count
    assert found["rayapp_num_requests_running", (("stage", "decode"),)] == 0
    assert found["rayapp_kv_transfer_bytes_total", ()] == 1000
    assert found["rayapp_kv_transfer_saved_bytes_total", (("by", "blocks"),)] == 2064
    assert found["rayapp_kv_transfer_seconds_total", ()] == 0.75


def test_metrics_without_a_ledger(http, service):
    service.ledger = UnavailableError("no ingress answers")
    found = samples(http.get("/metrics").text)
    assert ("rayapp_kv_transfer_bytes_total", ()) not in found
    assert found["rayapp_num_replicas", (("stage", "decode"),)] == 1


def test_the_page_of_a_dense_model(http):
    page = http.get("/").text
    assert "tiny" in page
    assert "dense model" in page
    assert "Nothing has travelled" in page
    assert "//" not in page.replace("<!doctype", "")


def test_the_page_of_a_pruned_model_escapes_names(http, service, serve_app, byte_tokenizer):
    signature = ModelSignature(
        model_type="llama",
        num_blocks=3,
        hidden_size=8,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=300,
        weights_fingerprint="w",
    )
    plan = PruningPlan.model_validate(
        {
            "model": signature.model_dump(),
            "prefill": {"blocks": {1: "kv_only"}},
            "decode": {"blocks": {2: "removed"}},
        }
    )
    service.description = ServiceDescription(
        model_name="<b>&tiny", max_model_len=9, vocab_size=300, tokenizer=byte_tokenizer, plan=plan
    )
    link = {**LINK, "source_node": "node-0", "destination_node": "node-1"}
    service.ledger = {"totals": LINK, "links": [link], "recent": []}
    with serve_app(build_app(service)) as url:
        page = httpx.get(url).text
    assert "&lt;b&gt;&amp;tiny" in page
    assert "<b>&tiny" not in page
    assert "block 1: kv_only" in page
    assert "block 2: removed" in page
    assert "4.00 \N{MULTIPLICATION SIGN}" in page
    assert "node-0" in page
    assert plan.fingerprint in page


def test_the_page_tells_why_pools_have_their_size():
    description = SimpleNamespace(
        model_name="m", mode="disaggregated", max_model_len=9, plan=PruningPlan()
    )
    lines = ("decode 1 -> 2: 4.1 s of work against a target of 2.0 s", "decode 2 -> 1: <later>")
    page = status_page(description, HealthReport(ready=True, decisions=lines), None)
    later, earlier = page.index("2 -&gt; 1: &lt;later&gt;"), page.index("decode 1 -&gt; 2: 4.1 s")
    assert later < earlier
    assert "Sizes of pools" not in status_page(description, HealthReport(ready=True), None)


def test_readable_bytes():
    assert [readable_bytes(n) for n in (0, 999, 1500, 2_500_000, -3000)] == [
        "0 B",
        "999 B",
        "1.5 KB",
        "2.5 MB",
        "-3.0 KB",
    ]


def test_the_schema_lists_the_routes(http):
    found = http.get("/openapi.json").json()
    paths = found["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health"} <= set(paths)
    completions = paths["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= set(completions)
    assert "422" not in completions  # FastAPI's own refusal, which is never sent
    assert set(completions["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "HTTPValidationError" not in found["components"]["schemas"]
