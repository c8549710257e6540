"""schemathesis reads ``/openapi.json`` and sends whatever that allows, and what it does not."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


def test_no_request_makes_the_server_fail_and_no_answer_is_undocumented(peer, address, tmp_path):
    found = peer(
        *("schemathesis", "schemathesis", "run", f"{address}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--max-examples", "25", "--seed", "1"),
        *("--phases", "examples,coverage,fuzzing", "--mode", "all", "--no-color"),
        *("--request-timeout", "30"),
        cwd=tmp_path,
    )
    assert "/v1/completions" in found or "Test cases" in found
