from __future__ import annotations

import json


def test_ways_to_choose_kv_at_equal_bytes(run_script, save_tiny, tmp_path):
    out = run_script(
        "kv_rules", "--model", save_tiny(tmp_path, "llama"), "--reductions", 2, 50, "--encodings",
        "int8", "--recent", 0.1, 0.5, "--calibration-per-task", 1, "--fresh-per-task", 2,
        "--tasks", "retrieval", "copy", "--length", "mixed",
    )  # fmt: skip
    [path] = out.glob("kv_rules-*.json")
    record = json.loads(path.read_text())
    assert record["prompt_tokens"]["min"] >= 128
    rows = {(row["way"], row["encoding"], row["target"]): row for row in record["results"]}
    assert rows["all", "model", None]["kl"] < 1e-6
    assert rows["all", "int8", None]["reduction"] > 3  # of float32
    ways = ("elimination", "mass", "sink + recent", "lazy blocks", "scored tokens")
    for way in ways:
        assert rows[way, "int8", 2]["reduction"] >= 2
        assert rows[way, "int8", 2]["kl_upper_95"] >= rows[way, "int8", 2]["kl"] >= 0
    assert not rows["elimination", "int8", 50]["reached"]
    assert record["selections"]["elimination, int8 at 2x"]["kv_transfer"] is not None
    text = path.with_suffix(".md").read_text()
    assert "| int8 | 50x | elimination | out of reach |" in text


def test_facts_and_text_of_articles(run_script, save_tiny, tmp_path):
    """Articles of a file instead of the test-bed's questions; only the ways asked for."""
    words = "Birds sing near the old mill. Nobody knows why. The river is cold! "
    articles = [{"prompt": f"Article: {n} {words * 6}"} for n in range(40)]
    file = tmp_path / "articles.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in articles))
    out = run_script(
        "kv_rules", "--model", save_tiny(tmp_path, "llama"), "--articles", file, "--prompt-tokens",
        200, 260, "--answer-tokens", 4, "--reductions", 2, "--encodings", "int4", "--recent", 0.1,
        "--ways", "elimination", "scored tokens", "--evaluations", 30, "--calibration-per-task", 1,
        "--fresh-per-task", 2, "--caption", "a tiny model", "--name", "articles",
    )  # fmt: skip
    record = json.loads((out / "kv_rules-articles.json").read_text())
    assert record["tasks"] == ["fact", "text"]
    assert 128 <= record["prompt_tokens"]["min"] <= record["prompt_tokens"]["max"] <= 260
    assert [row["way"] for row in record["results"]] == ["all"] * 3 + [
        "elimination",
        "scored tokens",
    ]
    assert record["results"][0]["points_lost"] == 0
    assert record["selections"]["elimination, int4 at 2x"]["evaluations"] <= 30
    text = (out / "kv_rules-articles.md").read_text()
    assert "a tiny model" in text
    assert "points lost (at most)" in text
