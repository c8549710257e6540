from __future__ import annotations

import json

import pytest

from rayapp.errors import InputError
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


def test_rows_of_a_record_that_stands_are_put_beside_new_ones(
    run_script, save_tiny, published_sets, tmp_path
):
    model = save_tiny(tmp_path, "llama")
    sets = published_sets(tmp_path / "sets")
    arguments = (
        "real_model", "--model", model, "--data", sets, "--maps", 0, "--calibration-per-task", 2,
        "--window", 64, "--runs", 0, "--dtype", "float32", "--plans", tmp_path / "plans",
        "--prompt-tokens", 16, "--answer-tokens", 2,
    )  # fmt: skip
    first = (*arguments, "--limit", 4, "--methods", "pop-p1-d0", "--work", tmp_path / "first")
    file = run_script(*first, "--runs", 1) / f"real_model-{model.name}.json"
    standing = json.loads(file.read_text())
    second = ("--methods", "int8", "--beside", file, "--work", tmp_path / "second")
    with pytest.raises(InputError, match="limit 4, and this run with 3"):
        run_script(*arguments, *second, "--limit", 3)
    run_script(*arguments, *second, "--limit", 4)
    joined = json.loads(file.read_text())
    assert [row["name"] for row in joined["rows"]] == ["dense", "pop-p1-d0", "int8"]
    assert joined["rows"][:2] == standing["rows"], "and they keep their times"
    assert joined["kept"] == ["pop-p1-d0"]
    other = save_tiny(tmp_path / "other", "mistral", seed=9)
    changed = other.rename(other.with_name(model.name))
    with pytest.raises(InputError, match="the dense model has"):
        run_script(
            *arguments, "--limit", 4, "--methods", "int4", "--beside", file,
            "--work", tmp_path / "third", "--model", changed,
        )  # fmt: skip
