"""Committed results: every page is what the recorder makes of its record."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
RECORDS = sorted(RESULTS.glob("*.json"))
_MEASURED_BY = {file: file.stem.partition("-")[0] for file in RECORDS}


def test_every_page_has_its_record():
    records = {file.stem for file in RECORDS}
    assert {file.stem for file in RESULTS.iterdir()} == records
    assert set(_MEASURED_BY.values()) <= {script.stem for script in BENCHMARKS.glob("*.py")}


@pytest.mark.parametrize("script", sorted(set(_MEASURED_BY.values())))
def test_pages_are_made_from_their_records(run_script, script):
    files = [file for file, name in _MEASURED_BY.items() if name == script]
    out = run_script(script, "--render", *files)
    for file in files:
        page = (out / f"{file.stem}.md").read_text()
        assert page == file.with_suffix(".md").read_text(), (
            f"{file.stem}.md is not what its record says; run "
            f"`python benchmarks/{script}.py --render benchmarks/results/{file.name}`"
        )
        drawing = file.with_suffix(".svg")
        assert drawing.is_file() == (out / drawing.name).is_file() == (drawing.name in page)
        if drawing.is_file():
            assert _words(out / drawing.name) == _words(drawing)


@pytest.mark.parametrize(
    "file", [*RECORDS, *(BENCHMARKS / "plans").glob("*.json")], ids=lambda file: file.stem
)
def test_no_folder_of_a_machine_is_named(file):
    assert re.findall(r'"(?:[^"=]*=)?/[^"]*"', file.read_text()) == []


def _words(drawing: Path) -> list[str]:
    """The words in a drawing, without the glyphs' places, which the drawing library chooses."""
    return re.findall(r"<!-- (.*?) -->", drawing.read_text())
