"""Commands that compute in their own process run where Ray cannot even be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayapp.plan import PruningPlan

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class NoRay(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, NoRay())
from rayapp.cli import main
main()
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.slow
def test_search_selection_and_report(tmp_path, save_tiny):
    model, data, out = save_tiny(tmp_path, "llama"), tmp_path / "data.jsonl", tmp_path / "out"
    lines = [{"prompt": "ab" * (3 + n), "completion": "cd"} for n in range(4)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("--model", model, "--calibration", data)
    sizes = ("--decode-remove", 1, "--evaluations", 4, "--workers", 0)
    searched = run("prune", *common, "--out", out, *sizes)
    assert searched.returncode == 0, searched.stderr
    assert PruningPlan.load(out).removed("decode") == 1
    chosen = run("kv-select", *common, "--plan", out, "--target-reduction", 1.5, "--last", 2)
    assert chosen.returncode == 0, chosen.stderr
    assert PruningPlan.load(out).kv_transfer
    measured = run("report", *common, "--plan", out, "--sensitivity")
    assert measured.returncode == 0, measured.stderr
    assert (out / "sensitivity.json").exists()
    other = run("prune", *common, "--out", tmp_path / "other", *sizes[:-1], 1)
    assert "ray is blocked" in other.stderr, "a search with workers would have noticed"
