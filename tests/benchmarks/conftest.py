"""Benchmarks run as scripts, small, in this process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_script(monkeypatch, tmp_path) -> Callable[..., Path]:
    """A function ``run_script(name, *arguments)`` that runs a benchmark, and gives its result
    directory.
    """

    def run(name: str, *arguments: object, script: Path | None = None) -> Path:
        script = script or BENCHMARKS / f"{name}.py"
        words = [str(script), *map(str, arguments), "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(script), run_name="__main__")
        return tmp_path

    return run
