from __future__ import annotations

import json


def test_studies_are_measured_once(run_script, save_tiny, tmp_path, capsys):
    model = save_tiny(tmp_path, "llama")
    arguments = (
        "ablation", "--model", model, "--studies", "spaces", "methods", "memory",
        "--calibration-per-task", 1, "--heal-per-task", 1, "--fresh-per-task", 2, "--runs", 1,
        "--seeds", 2, "--work", tmp_path / "work",
    )  # fmt: skip
    out = run_script(*arguments)
    record = json.loads((out / "ablation.json").read_text())
    studies = record["models"][model.name]
    assert [row["name"] for row in studies["spaces"]][:2] == [
        "one shared set", "subset rule (PDTrim)"
    ]  # fmt: skip
    methods = {row["name"]: row for row in studies["methods"]}
    assert methods["one_shot"]["seeds"] == 2
    assert methods["one_shot"]["search_s"] > 0
    for row in methods.values():
        assert row["kl_lowest"] <= row["kl"] <= row["kl_highest"]
    [held] = studies["memory"]
    assert held["prefill"] < held["dense"] > held["decode"]
    assert "| one_shot |" in (out / "ablation.md").read_text()
    capsys.readouterr()
    run_script(*arguments)
    assert " s\n" not in capsys.readouterr().out.split("Two of twelve")[0]  # no row anew
