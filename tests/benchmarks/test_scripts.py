"""What all benchmarks have in common."""

from __future__ import annotations

import ast
import json
import re
import runpy
from argparse import ArgumentParser
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
README = (BENCHMARKS / "README.md").read_text()
COMMON = {
    "--model", "--shape", "--device", "--dtype", "--threads", "--seed", "--name", "--out",
    "--render", "--runs", "--calibration-per-task", "--fresh-per-task", "--prompt-tokens",
    "--answer-tokens",
}  # fmt: skip
"""Options that mean the same wherever a script has them."""


def imported(file: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_no_script_is_imported():
    scripts = {script.stem for script in SCRIPTS}
    assert {"headline", "search_quality"} < scripts
    for file in BENCHMARKS.rglob("*.py"):
        assert not imported(file) & scripts, file


def test_every_script_writes_through_the_recorder():
    for script in SCRIPTS:
        text = script.read_text()
        assert not imported(script) & {"json", "subprocess", "matplotlib"}, script
        assert text.count("    run(parser(), measure, report") == 1, script
        assert not re.findall(r"this_machine|write_text|open\(", text), script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_guide_tells_the_claim_and_the_command(script):
    claim = ast.get_docstring(ast.parse(script.read_text())).partition("\n")[0]
    assert claim.startswith("Claim")
    [line] = [line for line in README.splitlines() if line.startswith(f"| `{script.name}` |")]
    words = set(re.findall(r"[\w.]+", line.lower()))
    assert set(re.findall(r"[\w.]+", claim.lower())) - {"claim"} <= words
    assert f"`python benchmarks/{script.name}" in line


def test_options_of_one_name_mean_the_same():
    seen: dict[str, tuple] = {}
    for script in SCRIPTS:
        parser: ArgumentParser = runpy.run_path(str(script), run_name="benchmark")["parser"]()
        options = {action.option_strings[0]: action for action in parser._actions}
        assert {"--threads", "--name", "--out", "--render"} <= set(options), script
        for name in COMMON & set(options):
            action = options[name]
            assert seen.setdefault(name, (action.dest, action.type)) == (action.dest, action.type)
    assert set(seen) == COMMON


def test_the_example_of_the_guide_runs(run_script, tmp_path):
    [example] = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)
    script = tmp_path / "sorting.py"
    script.write_text(example)
    out = run_script("sorting", script=script)
    record = json.loads((out / "sorting.json").read_text())
    assert record["configuration"] == {"device": "cpu", "dtype": "float32", "threads": 1}
    assert [row["order"] for row in record["results"]] == ["any", "in order"]
    assert "| order | ms |\n| --- | ---: |\n| any |" in (out / "sorting.md").read_text()
