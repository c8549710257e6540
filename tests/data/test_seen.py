"""What a plan was chosen on, and whether an evaluation meets it again."""

from __future__ import annotations

import json

from rayapp.data.seen import Seen, file_digest, prompt_digest


def written(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_record_names_tasks_files_and_prompts(tmp_path):
    calibration = written(
        tmp_path / "c.jsonl",
        {"prompt": "How  many?", "completion": "two", "task": "count"},
        {"goal": "boil water", "sol1": "heat it", "sol2": "cool it", "label": 0},
    )
    heal = written(tmp_path / "h.jsonl", {"prompt": "more", "completion": "x", "task": "copy"})
    seen = Seen.of([calibration, heal, None, tmp_path / "missing.jsonl"])
    assert seen.tasks == ("PIQA", "copy", "count")
    assert set(seen.files) == {file_digest(calibration), file_digest(heal)}
    assert prompt_digest("how many?") in seen.prompts.split()
    assert len(seen.prompts.split()) == 3


def test_what_was_seen_is_told():
    seen = Seen(tasks=("ARC-easy",), files=("f00",), prompts=prompt_digest("is it so?"))
    asked = [prompt_digest("IS it\nso?"), prompt_digest("is it not?")]
    assert "very file" in seen.told("other", ["f00"], asked)
    assert "1 of these 2 prompts" in seen.told("other", [], asked)
    assert "other examples of this task" in seen.told("arc_easy", [], asked[1:])
    assert not seen.told("arc_challenge", ["abc"], asked[1:])
    assert not Seen(tasks=("",)).told("", [], [])


def test_records_anywhere_in_a_provenance_count_together():
    provenance = {
        "seen": {"tasks": ["a"], "files": ["1"], "prompts": "aa"},
        "score_by_task": {"d": 0.1},
        "kv_select": {"seen": {"tasks": ["b"], "files": ["2"], "prompts": "bb"}},
        "other": {"seen": "not a record"},
    }
    seen = Seen.by(provenance)
    assert seen.tasks == ("a", "b", "d")
    assert seen.files == ("1", "2")
    assert seen.prompts == "aa bb"
    assert Seen.by({}) == Seen()
