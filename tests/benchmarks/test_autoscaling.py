"""The benchmark of autoscaling: a small load, its choice of settings, and its page."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.script


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def test_every_policy_runs_and_the_page_says_who_was_cheapest(tmp_path, monkeypatch):
    from tests.simulation.test_simulate import COSTS

    COSTS.model_copy(update={"name": "tested"}).save(tmp_path / "costs.json")
    words = [
        "autoscaling.py", "--costs", str(tmp_path / "costs.json"), "--loads", "poisson",
        "--rate", "1", "--span", "60", "--targets", "12000", "60", "--most", "6",
        "--out", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(BENCHMARKS / "autoscaling.py"), run_name="__main__")
    record = json.loads((tmp_path / "autoscaling.json").read_text())
    rows = record["results"]["poisson"]["rows"]
    assert {row["policy"] for row in rows} >= {"rayapp", "Ray Serve, default", "llm-d"}
    assert all(row["requests"] == rows[0]["requests"] for row in rows)
    page = (tmp_path / "autoscaling.md").read_text()
    assert "Simulated pools of tested" in page
    assert page.count("| rayapp |") == 2


def test_the_cheapest_setting_that_is_good_is_taken():
    from scaling.trials import chosen

    rows = [
        {"policy": "a", "within": 0.995, "replica_s": 9.0},
        {"policy": "a", "within": 0.992, "replica_s": 7.0},
        {"policy": "a", "within": 0.9, "replica_s": 1.0},
        {"policy": "b", "within": 0.8, "replica_s": 5.0},
        {"policy": "b", "within": 0.7, "replica_s": 1.0},
    ]
    assert [row["replica_s"] for row in chosen(rows, 0.99)] == [7.0, 5.0]
