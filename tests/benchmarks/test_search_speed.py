from __future__ import annotations

import json

import pytest

from rayapp.testbed import text_model_path

QUESTIONS = [
    {"prompt": "add:1+2 add?\n", "choices": ["3", "4", "15"], "answer": 0},
    {"prompt": "copy:abc copy?\n", "choices": ["abc", "abd"], "answer": 0},
]
LINES = [
    {"prompt": "add:1+2 add?\n", "completion": "3", "task": "add"},
    {"prompt": "copy:abcdef copy?\n", "completion": "abcdef", "task": "copy"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_choices_beside_forward_passes(run_script, tmp_path):
    questions = write(tmp_path / "questions.jsonl", QUESTIONS)
    out = run_script("search_speed", "--questions", questions, "--dtype", "float32")
    record = json.loads((out / "search_speed-testbed-text.json").read_text())
    found = record["parts"]["choices"]["result"]
    assert (found["num_questions"], found["num_choices"]) == (2, 5)
    assert found["tokens"]["a row per choice"] > found["tokens"]["every token once"]
    assert "ours" in (out / "search_speed-testbed-text.md").read_text()


@pytest.mark.slow
def test_two_checkouts_on_the_same_lines(run_script, tmp_path):
    lines = write(tmp_path / "lines.jsonl", LINES)
    out = run_script(
        "search_speed", "--lines", lines, "--dtype", "float32", "--candidates", 2,
        "--model", text_model_path(), "--remove", 2,
    )  # fmt: skip
    record = json.loads((out / "search_speed-testbed-text.json").read_text())
    for row in record["parts"]["search"]["result"]:
        assert row["runs"]["before"][0]["kl"] == row["runs"]["now"][0]["kl"]
    assert "candidates/CPU s" in (out / "search_speed-testbed-text.md").read_text()
