from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
from lines.resampled import ResampledScores

from rayapp.data.lines import TokenizedLine
from rayapp.pruning.evaluator.calibration import cut

SIZES = {"decode2": 10, "coupled2": 100}  # of five blocks


def test_methods_against_the_exhaustive_optimum(run_script, save_tiny, tmp_path):
    out = run_script(
        "search_quality", "--model", save_tiny(tmp_path, "llama"), "--spaces", *SIZES, "--methods",
        "surrogate", "one_shot", "exhaustive", "--trials", 2, "--coupled-trials", 1,
        "--calibration-per-task", 1, "--fresh-per-task", 2, "--resamples", 20,
    )  # fmt: skip
    record = json.loads((out / "search_quality-llama.json").read_text())
    rows = {(row["space"], row["method"], row["budget"]): row for row in record["results"]}
    methods = [(m, b) for m in ("surrogate", "one_shot") for b in ("share", "own")]
    methods.append(("exhaustive", "own"))
    assert list(rows) == [(space, *method) for space in SIZES for method in methods]
    for (space, method, budget), row in rows.items():
        errors = row["search_errors"]
        assert len(errors) == row["trials"] == (2 if space == "decode2" else 1)
        assert row["search_error_mean"] == pytest.approx(statistics.mean(errors))
        assert row["within_1_percent"] == sum(error <= 0.01 for error in errors)
        assert row["share"] == row["evaluations"] / SIZES[space]
        if method == "exhaustive":
            assert errors == [0] * len(errors)
            assert row["evaluations"] == SIZES[space]
        if budget == "share":
            assert row["evaluations"] <= 0.15 * SIZES[space]
        # The best set on fresh examples is one of the plans of the methods.
        assert row["regret"] >= -1e-12
    page = (out / "search_quality-llama.md").read_text()
    assert page.count("\n| coupled2 |") == 5


def test_resamples_are_of_lines_within_tasks():
    """Plans that score every line of a task alike score the same in every resample."""
    lines = cut([TokenizedLine((1, 2), (3,) * (1 + i % 3), "ab"[i % 2]) for i in range(20)])
    tokens_L = np.array([len(line.continuation) for line in lines.lines], float)
    per_token_L = np.array([{"a": 1.0, "b": 3.0}[line.task] for line in lines.lines])
    varied_L = tokens_L * np.arange(20)
    rng = np.random.default_rng(0)
    scores = ResampledScores(lines, np.stack([tokens_L * per_token_L, varied_L]), rng, 50)
    assert scores.value_P[0] == pytest.approx(2.0)
    assert scores.resampled_RP.shape == (50, 2)
    assert scores.resampled_RP[:, 0] == pytest.approx(2.0)
    assert scores.resampled_RP[:, 1].std() > 0.1
