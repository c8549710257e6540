from __future__ import annotations

import json


def test_the_engine_beside_generate(run_script):
    out = run_script(
        "decode_engine", "--shapes", "tiny", "--batch", 1, 2, "--prompt-tokens", 8,
        "--new-tokens", 4, "--repeats", 2,
    )  # fmt: skip
    record = json.loads((out / "decode_engine-tiny-float32.json").read_text())
    assert [row["batch"] for row in record["results"]] == [1, 2]
    for row in record["results"]:
        assert row["ratio_wall"] > 0
        assert row["bytes_per_step"] > 0
    assert "| 2 |" in (out / "decode_engine-tiny-float32.md").read_text()
