from __future__ import annotations

import json

import pytest


def test_the_map_has_every_block_of_both_stages(run_script, save_tiny, published_sets, tmp_path):
    model = save_tiny(tmp_path, "llama")
    arguments = (
        "block_map", "--model", model, "--data", published_sets(tmp_path / "sets"), "--sets", 2,
        "--lines-per-task", 2, "--dtype", "float32", "--work", tmp_path / "work",
        "--caption", "Tiny, by chance",
    )  # fmt: skip
    out = run_script(*arguments)
    record = json.loads((out / f"block_map-{model.name}.json").read_text())
    assert [one["num_lines"] for one in record["maps"]] == [6, 6]
    singles = [one["singles"] for one in record["maps"]]
    page = (out / f"block_map-{model.name}.md").read_text()
    assert "Tiny, by chance: KL" in page
    assert "over calibration sets (2, of 6 lines of WikiText" in page
    for block in range(5):
        mean = sum(each["prefill"][block] for each in singles) / 2
        [row] = [line for line in page.split("\n") if line.startswith(f"| {block} |")]
        assert float(row.split("|")[2]) == pytest.approx(mean, rel=1e-3)
    assert "<svg" in (out / f"block_map-{model.name}.svg").read_text()
