from __future__ import annotations

import json


def test_methods_against_the_exhaustive_optimum(run_script, save_tiny, tmp_path):
    out = run_script(
        "search_quality", "--model", save_tiny(tmp_path, "llama"), "--spaces", "decode2",
        "coupled2", "--methods", "surrogate", "one_shot", "exhaustive", "--trials", 2,
        "--coupled-trials", 1, "--lines-per-task", 1, "--fresh-per-task", 2, "--resamples", 20,
    )  # fmt: skip
    [path] = out.glob("search_quality-*.json")
    rows = json.loads(path.read_text())["results"]
    assert {row["space"] for row in rows} == {"decode2", "coupled2"}
    for row in rows:
        assert row["trials"] == (2 if row["space"] == "decode2" else 1)
        if row["method"] == "exhaustive":
            assert row["search_error_mean"] == 0
        assert row["search_error_mean"] >= 0
    assert "| coupled2 | one_shot |" in path.with_suffix(".md").read_text()
