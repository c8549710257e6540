"""The prefill benchmark on a model that takes no time."""

from __future__ import annotations

import json


def test_every_side_answers_alike_and_the_page_has_a_row_for_each(run_script):
    out = run_script(
        "prefill_engine", "--shape", "tiny", "--dtype", "float32", "--lengths", 40,
        "--chunk", 16, "--short", 3, 12, "--runs", 1,
    )  # fmt: skip
    record = json.loads((out / "prefill_engine-tiny-float32.json").read_text())
    rows = record["results"]
    assert [row["side"] for row in rows] == [
        "engine, whole", "engine, chunks", "transformers",
        "engine, one pass", "engine, one by one", "transformers",
    ]  # fmt: skip
    assert all(row["equal"] == row["prompts"] for row in rows)
    page = (out / "prefill_engine-tiny-float32.md").read_text()
    assert page.count("| transformers |") == 2
