from __future__ import annotations

import json


def test_groups_are_measured_beside_the_whole_prompt(run_script, save_tiny, tmp_path):
    out = run_script(
        "key_groups", "--model", save_tiny(tmp_path, "llama"), "--groups", 16, 64,
        "--fresh-per-task", 1, "--name", "small",
    )  # fmt: skip
    record = json.loads((out / "key_groups-small.json").read_text())
    rows = {(row["encoding"], row["group"]): row for row in record["results"]}
    assert set(rows) == {(e, g) for e in ("int8", "int4") for g in (16, 64, 0)}
    assert (
        rows["int8", 16]["reduction"] < rows["int8", 64]["reduction"] < rows["int8", 0]["reduction"]
    )
    assert rows["int4", 64]["kl"] > rows["int8", 64]["kl"] >= 0
    assert "64 (chosen)" in (out / "key_groups-small.md").read_text()
