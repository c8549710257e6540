from __future__ import annotations

import json
import statistics

import pytest


def test_the_engine_beside_generate(run_script):
    out = run_script(
        "decode_engine", "--shape", "tiny", "--batch", 1, 2, "--prompt-tokens", 8,
        "--answer-tokens", 4, "--runs", 2,
    )  # fmt: skip
    record = json.loads((out / "decode_engine-tiny-float32.json").read_text())
    assert [row["batch"] for row in record["results"]] == [1, 2]
    # Weights of four blocks, the last norm and the head; the embedding is read by row.
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
    weights = 4 * (4 * block + 64 + 300 * 64)
    entry = 2 * 2 * 16 * 4
    for row in record["results"]:
        assert row["equal_answers"] == row["batch"]
        assert row["bytes_per_step"] == weights + row["batch"] * 9.5 * 4 * entry
        for kind in ("wall", "cpu"):
            ours, theirs = (
                row[f"{side}_tokens_per_{kind}_s_all"] for side in ("engine", "generate")
            )
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            assert len(ratios) == 2
            assert row[f"ratio_{kind}"] == pytest.approx(statistics.median(ratios))
        steps_per_s = row["engine_tokens_per_wall_s"] / row["batch"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_per_step"] * steps_per_s / 1e9)
    page = (out / "decode_engine-tiny-float32.md").read_text()
    assert "`model.generate`: tiny, float32, 8 prompt and 4 new tokens" in page
    assert "\n| 2 |" in page
