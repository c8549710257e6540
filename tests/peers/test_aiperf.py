"""NVIDIA's aiperf puts the service under load, streamed, and every answer is as it expects."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

NUM_REQUESTS = 24


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_every_request_of_a_load_is_answered(peer, address, save_tiny, tmp_path, kind):
    model = save_tiny(tmp_path, "llama")
    peer(
        *("aiperf", "aiperf", "profile", "--model", "model", "--url", address),
        *("--endpoint-type", kind, "--streaming", "--request-count", NUM_REQUESTS),
        *("--concurrency", 4, "--tokenizer", model, "--random-seed", 1),
        *("--synthetic-input-tokens-mean", 30, "--output-tokens-mean", 12),
        *("--extra-inputs", "ignore_eos:true", "--ui", "simple"),
        *("--output-artifact-dir", tmp_path / "found"),
        cwd=tmp_path,
    )
    (file,) = (tmp_path / "found").rglob("profile_export_aiperf.json")
    found = json.loads(file.read_text())
    assert found["request_count"]["avg"] == NUM_REQUESTS
    assert not found.get("error_request_count", {}).get("avg")
    assert found["time_to_first_token"]["avg"] > 0
