"""A directory that looks like a clone after ``make demo``, and a shell like a user's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayapp.testbed.tasks import TASKS, generate, write_jsonl
from tests.docs.guides import ROOMS, ROOT, Block

PER_TASK = 4
SEARCH = (
    "rayapp prune --model rayapp/testbed/text --calibration out/demo/data/calibration.jsonl "
    "--out out/demo --decode-remove 1 --evaluations 2"
)


class Clone:
    """A directory with the project's rooms in it, where guides' commands run as they stand."""

    def __init__(self, home: Path) -> None:
        self.home = home
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {
            **os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def bash(self, script: str) -> str:
        """Run a shell script to its end; returns what it printed."""
        return self.run(Block("sh", script))

    def run(self, block: Block) -> str:
        """Run a block of a guide to its end; returns what it printed."""
        program = {"sh": ["bash", "-euo", "pipefail"], "python": ["python"]}[block.language]
        done = subprocess.run(
            [*program, "-c", block.text], cwd=self.home, env=self.environment,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Clone:
    """A clone after ``make demo``, with few examples per task and a small search."""
    home = tmp_path_factory.mktemp("clone")
    for room in ROOMS:
        (home / room).symlink_to(ROOT / room)
    data = home / "out" / "demo" / "data"
    data.mkdir(parents=True)
    for split in ("calibration", "test"):
        lines = [line for task in TASKS for line in generate(task, split, PER_TASK, 0)]
        write_jsonl(data / f"{split}.jsonl", lines)
    made = Clone(home)
    made.bash(SEARCH)
    return made
