from __future__ import annotations

import json

from rayapp.plan import PruningPlan


def test_rows_are_counted_measured_and_their_plans_kept(
    run_script, save_tiny, published_sets, tmp_path, capsys
):
    model = save_tiny(tmp_path, "llama")
    arguments = (
        "real_model", "--model", model, "--data", published_sets(tmp_path / "sets"), "--methods",
        "pop-p1-d0", "--maps", 0, "--calibration-per-task", 2, "--limit", 4, "--window", 64,
        "--runs", 2, "--prompt-tokens", 16, "--answer-tokens", 2, "--dtype", "float32",
        "--work", tmp_path / "work", "--plans", tmp_path / "plans", "--caption", "Tiny, by chance",
    )  # fmt: skip
    run_script(*arguments, "--count")
    assert "2 of 2 rows left" in capsys.readouterr().out
    out = run_script(*arguments)
    stem = f"real_model-{model.name}"
    record = json.loads((out / f"{stem}.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["dense", "pop-p1-d0"]
    plan = PruningPlan.load(tmp_path / "plans" / f"{stem}-pop-p1-d0.json")
    assert plan.removed("prefill") == 1
    page = (out / f"{stem}.md").read_text()
    assert page.startswith("![What every plan keeps")
    assert "Tiny, by chance, float32" in page
    assert "| POP's rule | 1 and 0 |" in page
    assert "earlier runs" not in page
    run_script(*arguments)
    page = (out / f"{stem}.md").read_text()
    assert "- 2 of 2 rows were measured by earlier runs" in page
