from __future__ import annotations

import json


def test_models_and_methods_against_the_exhaustive_truth(run_script, save_tiny, tmp_path):
    out = run_script(
        "surrogate_gradients", "--model", save_tiny(tmp_path, "llama"), "--spaces", "decode2",
        "coupled2", "--trials", 2, "--coupled-trials", 1, "--lines-per-task", 1, "--draws", 2,
        "--resamples", 20,
    )  # fmt: skip
    [path] = out.glob("surrogate_gradients-*.json")
    record = json.loads(path.read_text())
    models = {(row["space"], row["model"]): row for row in record["models"]}
    assert len(models) == 2 * 6
    assert models["decode2", "gradients"]["cost"] == 3
    assert models["decode2", "gradients, 2 draws"]["cost"] == 5
    assert models["coupled2", "sum of singles"]["cost"] == 1 + 2 * 5
    for row in record["models"]:
        assert row["trials"] == (2 if row["space"] == "decode2" else 1)
        assert -1 <= row["correlation"] <= 1
        assert min(row["favourite_errors"]) >= 0
        assert min(row["costs_to_1_percent"]) >= (1 if "fitted" in row["model"] else row["cost"])
    assert {row["method"] for row in record["methods"]} == {"cbo", "surrogate", "one_shot"}
    assert "| coupled2 | cbo |" in path.with_suffix(".md").read_text()
