from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cost.held_out import relative_loss

from rayapp.data.lines import TokenizedLine
from rayapp.pruning.evaluator.calibration import cut

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = (
    "--lines", 8, "--held-out", 8, "--prompt-tokens", 24, "--continuation-tokens", 6,
    "--chunk-tokens", 60, "--evaluations", 12, "--seeds", 2, "--decode-runs", 1,
    "--runs", 1, "--worker-candidates", 2,
)  # fmt: skip


def test_the_parts_that_need_no_ray(run_script, save_tiny, tmp_path, capsys):
    model = save_tiny(tmp_path, "llama")
    arguments = ("--model", model, "--method", "surrogate", *SMALL)
    out = run_script("search_cost", *arguments, "--only", "search", "decode_only")
    parts = json.loads((out / "search_cost-llama-surrogate.json").read_text())["parts"]
    for row in parts["search"]["result"]["seeds"]:
        assert row["naive/search"]["forwards"] > 1
        assert row["naive/racing"]["forwards"] > 1
    assert len(parts["search"]["result"]["held_out"]["plans"]) == 2
    # Counted exactly: a removed block runs nothing, and prefill makes the first of C tokens.
    decode = parts["decode_only"]["result"]
    assert decode["bound"] == pytest.approx(30 / 6 * 25 / 15)
    naive, ours = 5 * (24 * 5 + 5 * 4), 5 * (4 + 3 + 2 + 1)
    assert decode["reached"]["forwards"] == pytest.approx(naive / ours)

    run_script("search_cost", *arguments, "--only", "simulation")
    again = json.loads((out / "search_cost-llama-surrogate.json").read_text())["parts"]
    assert again["search"] == parts["search"]
    assert set(again) == {"search", "decode_only", "simulation"}
    speed_ups = [row["speed_up"] for row in again["simulation"]["result"]]
    assert speed_ups[0] == 1 < speed_ups[1] <= 2
    text = (out / "search_cost-llama-surrogate.md").read_text()
    assert "Decode-only" in text
    assert "simulated" in text
    assert text in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers(save_tiny, tmp_path):
    words = ["--model", save_tiny(tmp_path, "llama"), *SMALL, "--only", "workers"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "search_cost.py"), *map(str, words), "--out", tmp_path],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Two Ray evaluators against one" in done.stdout


def test_the_loss_is_paired_over_seeds_and_lines():
    rng = np.random.default_rng(3)
    lines = cut([TokenizedLine((1, 2), (3,) * (1 + i % 3), "ab"[i % 2]) for i in range(40)])
    first_L = rng.exponential(size=40)
    sums_PL = np.stack([first_L, 1.1 * first_L, rng.permutation(first_L)])
    assert relative_loss(lines, sums_PL, np.array([[0, 0], [2, 2]])) == (0.0, 0.0)
    always = relative_loss(lines, sums_PL, np.array([[0, 1]] * 10))
    assert always == pytest.approx((0.1, 0.1))
    seldom = relative_loss(lines, sums_PL, np.array([[0, 0]] * 9 + [[0, 1]]))
    assert seldom[0] == pytest.approx(0.01)
    assert 0.01 < seldom[1] < 0.1
    mean, upper = relative_loss(lines, sums_PL, np.array([[0, 2]] * 10))
    assert upper > mean + 0.05
