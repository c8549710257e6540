from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_front_without_healing_and_with(run_script, save_tiny, tmp_path):
    model = save_tiny(tmp_path, "llama")
    out = run_script(
        "headline", "--model", model, "--decode-remove", 1, "--unit", "block", "part", "--goals",
        "2:int8", "--calibration-per-task", 1, "--validation-per-task", 2, "--test-per-task", 2,
        "--runs", 2, "--work", tmp_path / "work",
    )  # fmt: skip
    record = json.loads((out / f"headline-{model.name}.json").read_text())
    rows = {row["plan_name"]: row for row in record["validation"]}
    # Parts are searched without healing alone: only whole blocks are healed.
    assert set(rows) == {"none-1-1-kv2-int8", "none-1-1-parts-kv2-int8", "all-1-1-kv2-int8"}
    # The choice weighs this checkpoint's float32, the front bf16: scales weigh more beside it.
    assert all(1.8 < row["reduction"] < 2.1 for row in rows.values())
    assert set(record["chosen"].values()) == set(record["test"])
    for tested in record["test"].values():
        assert tested["worst_lost_upper"] >= tested["worst_lost"]
        assert tested["examples_per_task"] == 2
        assert tested["speed"]["speedup"] > 0 < tested["speed"]["speedup_batch8"]
    assert "| all-1-1-kv2-int8 |" in (out / f"headline-{model.name}.md").read_text()
