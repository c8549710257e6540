from __future__ import annotations

import json


def test_pages_beside_slots(run_script):
    out = run_script(
        "paged_decode", "--shape", "tiny", "--rows", 1, 3, "--tokens", 24, "--long", 90,
        "--short-rows", 3, "--slots", 2, "--max-model-len", 256, "--steps", 2, "--runs", 2,
        "--churn-steps", 8,
    )  # fmt: skip
    record = json.loads((out / "paged_decode-tiny-float32.json").read_text())
    assert [row["rows"] for row in record["equal"]] == [1, 3]
    mixed = record["mixed"]
    assert mixed["ratio_range"][0] <= mixed["ratio"] <= mixed["ratio_range"][1]
    apart_s = mixed["short_cpu_s"] + mixed["long_cpu_s"]
    assert 0.2 < mixed["ratio"] / (mixed["all_cpu_s"] / apart_s) < 5  # medians of two runs
    # 2 x 256 tokens are 32 pages of a block, 24 tokens take 2 of them, and 2 stay free.
    assert record["full"]["sequences"] == 15
    assert 0.5 < record["full"]["churn_usage"] <= 1
    page = (out / "paged_decode-tiny-float32.md").read_text()
    assert "In the memory of 2 slots of 256 tokens, 15 sequences of 24 tokens run." in page
