"""Benchmarks run as scripts, small, in this process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.script)


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
