"""guidellm puts the service under load, and no request of it fails."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

NUM_REQUESTS = 16


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_request_of_a_load_is_answered(peer, address, save_tiny, tmp_path, path):
    model, found = save_tiny(tmp_path, "llama"), tmp_path / "found.json"
    peer(
        *("guidellm", "guidellm", "run"),
        *("--backend", f"kind=openai_http,target={address},model=model,request_format={path}"),
        *("--tokenizer", f"kind=hf_auto,model={model}"),
        *("--data", "kind=synthetic_text,prompt_tokens=30,output_tokens=12"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--output", f"kind=json,path={found}", "--disable-console-interactive"),
        cwd=tmp_path,
    )
    (load,) = json.loads(found.read_text())["benchmarks"]
    assert load["metrics"]["request_totals"]["successful"] == NUM_REQUESTS
    assert not load["metrics"]["request_totals"]["errored"]
    assert load["metrics"]["time_to_first_token_ms"]["successful"]["mean"] > 0
