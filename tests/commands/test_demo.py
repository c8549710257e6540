from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from rayapp import cli
from rayapp.errors import InputError
from rayapp.testbed import text_model_path
from rayapp.testbed.tasks import TASKS, generate
from rayapp.workflows.demo.loop import _way_on, next_commands
from rayapp.workflows.demo.subject import Files
from rayapp.workflows.demo.testbed import SEEDS, TEST_PER_TASK, shipped_subject, write_lines


def test_test_prompts_are_none_of_those_that_the_sizes_were_chosen_on(tmp_path):
    files = Files(tmp_path)
    files.calibration.parent.mkdir(parents=True)
    write_lines(files)
    prompts = {
        path.name: [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        for path in (files.calibration, files.test)
    }
    fresh = prompts["test.jsonl"]
    seen = {e.prompt for task in TASKS for e in generate(task, "test", 10 * TEST_PER_TASK, 0)}
    assert SEEDS["test"] != 0
    assert len(set(fresh)) == len(fresh) == len(TASKS) * TEST_PER_TASK
    assert not seen & set(fresh)
    assert not set(prompts["calibration.jsonl"]) & set(fresh)


def test_the_commands_that_go_on_are_commands_as_they_stand(tmp_path, monkeypatch):
    """What is printed is parsed by the command's own options, and its files lie in the demo's."""
    monkeypatch.chdir(tmp_path)
    files = Files(Path("out/a demo"))
    printed = [
        line.strip() for line in "\n".join(_way_on(shipped_subject(), files.out)).splitlines()
    ]
    pasted = [shlex.split(line)[1:] for line in printed if "--" in line]
    assert pasted == list(next_commands(shipped_subject(), files).values())
    assert [name for name, *_ in pasted] == ["kv-select", "evaluate", "report", "serve"]
    for name, *words in pasted:
        options = cli.load(name).make_context(name, list(words)).params
        assert str(options["plan"]) == str(files.out)
        if name != "report":
            assert options["model"] == str(text_model_path())


def test_the_next_reduction_is_a_goal_that_kv_select_takes(tmp_path):
    """Its settings are checked as the command checks them, up to the files, which are missing."""
    words = next(iter(next_commands(shipped_subject(), Files(tmp_path)).values()))
    with pytest.raises(InputError, match="plan"):
        cli.load(words[0]).main(words[1:], standalone_mode=False)
