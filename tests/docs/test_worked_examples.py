"""The worked examples of the package's guide, done for real in a copy of the project.

A fence marked ``example`` is a new file (its first line names it), changed lines of a file,
commands, or a program to try. All examples are applied to one copy and run in one process, so they
must also get along with one another.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rayapp.plan import PruningPlan
from rayapp.testbed.tasks import TASKS, generate, write_jsonl

PROJECT = Path(__file__).parents[2]
GUIDE = PROJECT / "rayapp" / "README.md"
EXAMPLES = ("A search method", "A KV rule", "A visual scorer", "A model family")
MOST_FILES = 3
_FENCE = re.compile(r"^```(\w+) example\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^### (.+?)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)

# Runs what the examples say should be run, and writes an error message or "" for every example.
_RUNNER = """
import json, shlex, sys, traceback
import pytest
import rayapp.cli

def do(kind, text):
    if kind == "python":
        return exec(compile(text, "try it", "exec"), {"__name__": "example"})
    for line in text.splitlines():
        words = shlex.split(line)
        if words[0] == "rayapp":
            try:
                rayapp.cli.main(words[1:])
            except SystemExit as end:  # the command line always ends so
                assert not end.code, f"ended with {end.code}: {line}"
        else:
            assert words[:3] == ["python", "-m", "pytest"], line
            assert pytest.main(["-q", "-p", "no:cacheprovider", *words[3:]]) == 0, line

told = {}
for name, steps in json.load(open("steps.json")).items():
    told[name] = ""
    try:
        for kind, text in steps:
            do(kind, text)
    except BaseException:
        told[name] = traceback.format_exc()
json.dump(told, open("told.json", "w"))
"""


@dataclass
class Example:
    """What one section of the guide makes the reader write and run."""

    new: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, section: str) -> Example:
        made = cls()
        for kind, text in _FENCE.findall(section):
            first, _, rest = text.partition("\n")
            if kind == "diff":
                made.changed[first.removeprefix("--- ")] = rest
            elif kind == "python" and first.startswith("# rayapp/"):
                made.new[first.removeprefix("# ")] = rest
            else:
                made.steps.append((kind, text))
        return made


def examples() -> dict[str, Example]:
    return {name: Example.of(body) for name, body in _SECTION.findall(GUIDE.read_text("utf-8"))}


def changed(text: str, hunks: str) -> str:
    """A file after the changes of an example; every hunk must fit in exactly one place."""
    for hunk in hunks.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"these lines stand {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


def applied() -> dict[str, str]:
    """The files that all examples together make or change, as they are afterwards."""
    files: dict[str, str] = {}
    for example in examples().values():
        for name, text in example.new.items():
            assert not (PROJECT / name).exists(), f"{name} is there already"
            files[name] = text
        for name, hunks in example.changed.items():
            before = files.get(name) or (PROJECT / name).read_text("utf-8")
            files[name] = changed(before, hunks)
    return files


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A copy of the project with all examples in it, after they ran."""
    home = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("rayapp", "tests"):
        shutil.copytree(PROJECT / name, home / name, ignore=ignored)
    shutil.copy(PROJECT / "pyproject.toml", home)
    for name, text in applied().items():
        (home / name).write_text(text, "utf-8")
    data = home / "out" / "demo" / "data"
    data.mkdir(parents=True)
    lines = [generate(task, "calibration", 1, 0, length="short") for task in TASKS]
    write_jsonl(data / "calibration.jsonl", [line for task in lines for line in task])
    steps = {name: example.steps for name, example in examples().items()}
    (home / "steps.json").write_text(json.dumps(steps))
    environment = {**os.environ, "PYTHONPATH": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER], cwd=home, env=environment, capture_output=True, text=True
    )
    assert (home / "told.json").exists(), done.stdout + done.stderr
    return home


def test_the_guide_tells_four_examples_of_three_files_at_most():
    assert tuple(examples()) == EXAMPLES
    for name, example in examples().items():
        assert 1 <= len({*example.new, *example.changed}) <= MOST_FILES, name
        assert example.steps, name


def test_new_files_and_changed_lines_fit_the_project_and_are_python():
    files = applied()
    assert len(files) > len(EXAMPLES)
    for name, text in files.items():
        for node in ast.walk(ast.parse(text, name)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("rayapp"):
                path = f"{node.module.replace('.', '/')}.py"
                package = (PROJECT / path).with_suffix("")
                assert path in files or (PROJECT / path).exists() or package.is_dir(), node.module


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_it_is_written(home, name):
    told = json.loads((home / "told.json").read_text())
    assert told[name] == ""


@pytest.mark.slow
def test_the_new_method_wrote_a_plan(home):
    plan = PruningPlan.load(home / "out" / "descent")
    assert plan.removed("decode") == 2
    assert plan.provenance["settings"]["method"] == "descent"


@pytest.mark.slow
def test_the_new_rule_is_among_the_choices(home):
    record = json.loads((home / "out" / "first-part" / "kv.json").read_text())
    cuts = {(first, last) for trial in record["trials"] for _, first, last, _ in trial["kv"]}
    assert {("0.5", "0"), ("0.75", "0"), ("4", "0.25")} <= cuts
    assert record["complete"] is True


def test_the_house_of_the_guide_is_that_of_the_import_contract():
    picture = re.search(r"```text\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    floors = [re.split(r"  +", line)[0] for line in picture.group(1).splitlines()]
    contracts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert floors == contracts["contracts"][0]["layers"]
