from __future__ import annotations

import json
import statistics

import pytest


def test_studies_are_measured_once(run_script, save_tiny, tmp_path, capsys):
    model = save_tiny(tmp_path, "llama", num_hidden_layers=3)
    arguments = (
        "ablation", "--model", model, "--studies", "spaces", "methods", "memory",
        "--calibration-per-task", 1, "--heal-per-task", 1, "--fresh-per-task", 2, "--runs", 1,
        "--seeds", 2, "--work", tmp_path / "work",
    )  # fmt: skip
    out = run_script(*arguments)
    record = json.loads((out / "ablation.json").read_text())
    studies = record["models"][model.name]
    assert [row["name"] for row in studies["spaces"]] == [
        "one shared set", "subset rule (PDTrim)", "kv modes", "kv modes, parts"
    ]  # fmt: skip
    methods = {row["name"]: row for row in studies["methods"]}
    plans = tmp_path / "work" / model.name / "plans"
    for name, row in methods.items():
        took = [
            json.loads((plans / f"method-{name}-{s}" / "took.json").read_text()) for s in (0, 1)
        ]
        assert row["seeds"] == 2
        for key in ("evaluations", "search_s"):
            assert row[key] == pytest.approx(statistics.mean(each[key] for each in took))
        assert row["kl"] == pytest.approx((row["kl_lowest"] + row["kl_highest"]) / 2)
    [held] = studies["memory"]
    assert held["prefill"] < held["dense"] > held["decode"]
    commits = {row["commit"] for rows in studies.values() for row in rows}
    assert commits == {record["machine"]["commit"]}
    page = (out / "ablation.md").read_text()
    assert f"| {model.name} | one_shot |" in page
    assert "mean over calibration sets and seeds" in capsys.readouterr().out
    run_script(*arguments)
    assert capsys.readouterr().out == page  # no row was measured anew
