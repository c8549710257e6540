from __future__ import annotations

import json

from rayapp.testbed.tasks import TASKS, generate
from rayapp.workflows.demo import SEEDS, TEST_PER_TASK, Files, _write_data


def test_test_prompts_are_none_of_those_that_the_sizes_were_chosen_on(tmp_path):
    files = Files(tmp_path)
    _write_data(files)
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
