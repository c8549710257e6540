"""The benchmarks of a service under load, small: every load, replicas that are killed, a soak."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ("--dtype", "float32", "--requests", 12, "--divisor", 64, "--max-model-len", 128,
         "--max-num-seqs", 4)  # fmt: skip
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,444
2023-11-16 18:15:50.9951690,396,309
"""


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def test_loads_are_traces_drawn_ones_and_bursts(tmp_path):
    from serving.loads import loads_of

    file = tmp_path / "conv.csv"
    file.write_text(TRACE)
    sizes = {"requests": 2, "divisor": 8, "max_model_len": 128, "seed": 1}
    asked = Namespace(trace=[file], loads=["poisson", "long-prompts"], burst=2, **sizes)
    loads = loads_of(asked)
    assert list(loads) == ["conv", "poisson", "long-prompts", "conv, 2 at once"]
    assert [arrival.at_s for arrival in loads["conv, 2 at once"]] == [0.0, 0.0]
    assert loads["conv"][1].at_s > 4
    assert list(loads_of(Namespace(trace=[], loads=[], burst=1, **sizes))) == ["poisson"]


def test_what_grows_is_told_from_what_is_flat():
    from serving.flatness import Limits, judged

    few = Limits(0.05, 1.0)
    warm = [10, 60, 100, 100, 101, 100, 102, 101, 100]  # the first third does not count
    assert judged(warm, few)["is_flat"]
    assert not judged([*warm[:6], 110, 115, 120], few)["is_flat"]
    assert judged([5.0, 5.0, 5.9], few)["is_flat"]  # less than anybody would call growth
    assert judged([0, 0, 0], None)["is_flat"]
    assert not judged([0, 1, 0, 0, 0, 0], None)["is_flat"]  # a lease that was left once
    assert judged([3.0], few)["is_flat"]


def record_of(out, name, *arguments):
    """Run a benchmark; once more only if its own cluster did not come up beside the others."""
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments), "--out", out],
            check=False, timeout=500, capture_output=True, text=True,
        )  # fmt: skip
        if "of the local cluster did not start" not in ended.stderr:
            break
    assert ended.returncode == 0, ended.stderr[-3000:]
    (found,) = out.glob("*.json")
    page = found.with_suffix(".md").read_text()
    return json.loads(found.read_text())["results"], page


@pytest.fixture
def small(save_tiny, tmp_path):
    """A model, and a directory for what is measured."""
    return save_tiny(tmp_path / "model", "llama"), tmp_path / "out"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1100)
def test_both_modes_under_every_load(small):
    model, out = small
    results, page = record_of(
        *(out, "serving_trace", "--model", model, *SMALL, "--loads", "poisson", "long-prompts"),
        *("--burst", 4, "--streams", 2, "--stream-lengths", 9, 5, "--capacity-requests", 8),
    )
    names = [row["server"] for row in results["servers"]]
    assert names == ["rayapp, unified", "rayapp, disaggregated"]
    for row in results["servers"]:
        assert list(row["open"]) == ["poisson", "long-prompts", "poisson, 4 at once"]
        for found in (*row["open"].values(), *row["streams"].values()):
            assert found["failed"] == found["other_length"] == 0
            assert found["cpu_s"] > 0
    assert results["servers"][0]["open"]["poisson"]["kv_bytes"] == 0
    assert results["servers"][1]["open"]["poisson"]["kv_bytes"] > 0
    assert page.count("p99 ITL disaggregated is") == 3


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1100)
def test_replicas_that_are_killed_lose_no_answer(small):
    model, out = small
    results, page = record_of(
        *(out, "serving_faults", "--model", model, *SMALL, "--minutes", 0.6, "--period", 8),
        *("--capacity-requests", 8, "--share", 0.3),
    )
    calm, found = results["undisturbed"], results["disturbed"]
    assert found["kills"] >= 1
    assert calm["failed"] == found["failed"] == 0
    assert found["compared"] == found["requests"] == calm["requests"]
    assert found["other_text"] == 0
    assert f"{found['kills']} replicas were killed" in page


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1100)
def test_a_short_soak_leaves_nothing_behind(small):
    model, out = small
    results, page = record_of(
        out, "serving_soak", "--model", model, *SMALL, "--soak", 0.5, "--round", 4, "--streams", 4
    )
    assert results["failed"] == 0
    assert results["requests"] > 20
    found = results["quantities"]
    nothing = {"leases", "bookings", "slots", "running", "waiting", "pinned bytes", "answering"}
    some = {"memory of replicas, MB", "open files of Ray", "object store, MB"}
    assert nothing | some <= set(found)
    assert all(found[name]["is_flat"] for name in (*nothing, "pages of KV, share"))
    assert found["memory of replicas, MB"]["after"] > 100
    assert "| leases |" in page
