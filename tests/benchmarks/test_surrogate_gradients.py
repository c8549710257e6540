from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
from exhaustive.ranking import Truth

from rayapp.pruning.candidates.space import Space
from rayapp.pruning.methods.quadratic import Quadratic, features


def test_models_and_methods_against_the_exhaustive_truth(run_script, save_tiny, tmp_path):
    out = run_script(
        "surrogate_gradients", "--model", save_tiny(tmp_path, "llama"), "--spaces", "decode2",
        "coupled2", "--trials", 2, "--coupled-trials", 1, "--calibration-per-task", 1, "--draws", 2,
        "--resamples", 20,
    )  # fmt: skip
    record = json.loads((out / "surrogate_gradients-llama.json").read_text())
    models = {(row["space"], row["model"]): row for row in record["models"]}
    assert len(models) == 2 * 6
    assert models["decode2", "gradients"]["cost"] == 3
    assert models["decode2", "gradients, 2 draws"]["cost"] == 5
    assert models["coupled2", "sum of singles"]["cost"] == 1 + 2 * 5
    for row in record["models"]:
        assert row["trials"] == (2 if row["space"] == "decode2" else 1)
        assert len(row["favourite_errors"]) == len(row["costs_to_1_percent"]) == row["trials"]
        assert row["favourite_error_median"] == statistics.median(row["favourite_errors"])
        assert row["cost_to_1_percent_median"] == statistics.median(row["costs_to_1_percent"])
        if "fitted" not in row["model"]:  # scores that the fitted model was told may meet the limit
            assert min(row["costs_to_1_percent"]) > row["cost"]
    methods = {(row["space"], row["method"]): row for row in record["methods"]}
    assert list(methods) == [
        (space, method) for space in ("decode2", "coupled2")
        for method in ("cbo", "surrogate", "one_shot")
    ]  # fmt: skip
    assert methods["coupled2", "surrogate"]["evaluations"] <= 15
    assert "\n| coupled2 | cbo |" in (out / "surrogate_gradients-llama.md").read_text()


def test_a_model_is_ranked_by_the_order_of_its_predictions():
    space = Space(4, 0, 2)
    candidates = list(space)
    rng = np.random.default_rng(0)
    units_NM = features(space, candidates)
    right = Quadratic.additive(1.0 + rng.permutation(units_NM.shape[1]))
    scores_N = right.predict(units_NM)
    truth = Truth(space, candidates, units_NM, scores_N)
    unseen_N = np.ones(len(candidates), dtype=bool)
    best = truth.ranking(right, unseen_N, cost=7)
    assert best.correlation == pytest.approx(1.0)
    assert (best.favourite_error, best.cost_to_limit) == (0.0, 7 + 1)
    wrong = Quadratic.additive(-right.linear_M)
    worst = truth.ranking(wrong, unseen_N, cost=7)
    assert worst.correlation == pytest.approx(-1.0)
    assert worst.favourite_error == pytest.approx(scores_N.max() / scores_N.min() - 1)
    assert worst.cost_to_limit == 7 + len(candidates)
    told = [candidates[int(scores_N.argmin())]]
    assert truth.ranking(wrong, unseen_N, cost=1, told=told).cost_to_limit == 1
