"""The benchmarks of the handoff, small, each in a process and on a cluster of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayapp.kv.ledger import KVShape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.ray]


def record_of(out, name, *arguments):
    """Run a benchmark, twice if its cluster of its own does not come up beside the others."""
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments), "--out", out],
            check=False, timeout=400, capture_output=True, text=True,
        )  # fmt: skip
        if ended.returncode == 0:
            break
    assert ended.returncode == 0, ended.stderr[-3000:]
    (found,) = out.glob("*.json")
    assert found.with_suffix(".md").read_text().count("|")
    return json.loads(found.read_text())


@pytest.mark.timeout(900)
def test_kv_between_two_nodes_beside_bare_bytes(tmp_path):
    sizes = ("--shape", "tiny", "--tokens", 64, 300, "--part-tokens", 128, "--runs", 2)
    rows = record_of(tmp_path, "kv_transfer", *sizes, "--plans", "dense", "all")["results"]
    assert [(row["tokens"], row["plan"], row["num_parts"]) for row in rows] == [
        (64, "dense", 1), (64, "all", 1), (300, "dense", 3), (300, "all", 3),
    ]  # fmt: skip
    shape = KVShape(4, 2, 16, 2, (None,) * 4)
    assert rows[2]["payload_bytes"] == shape.dense_bytes(300)
    assert rows[3]["payload_bytes"] < rows[2]["payload_bytes"] / 4
    assert all(row[f"{way}_s"] > 0 for row in rows for way in ("bare", "whole", "parts"))


@pytest.mark.timeout(900)
def test_what_parts_hide(tmp_path, save_tiny):
    model = save_tiny(tmp_path / "model", "llama")
    arguments = ("--model", model, "--dtype", "float32", "--tokens", 20, 200, "--runs", 2)
    out = tmp_path / "out"
    rows = record_of(out, "kv_overlap", *arguments, "--chunk-tokens", 64, "--max-model-len", 256)
    by = {(row["way"], row["tokens"]): row for row in rows["results"]}
    assert {way for way, _ in by} == {"whole", "parts", "at once"}
    assert by["whole", 200]["hidden_s"] == 0
    assert all(row["second_s"] > 0 for row in by.values())
    assert by["whole", 200]["bytes_sent"] < by["at once", 200]["bytes_sent"]  # more headers
