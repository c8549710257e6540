"""An evaluation as tables and caveats, and the progress of one."""

from __future__ import annotations

import io
import re

from rich.console import Console

from rayapp.evaluation.progress import shown_progress
from rayapp.evaluation.table import markdown, tables


def test_markdown_tables(evaluation):
    text = markdown(evaluation)
    assert "| copy | 40 | 0.0100 | 0.0234 | 0.0312 | 100.0% | 95.0% | +5.00 | +11.25 |" in text
    assert "| so\\|rt | 130-300 | 200,000 | 50,000 | 1,000 | 4.00x |" in text
    assert "| speed-up |  | 2.00x | 1.25x | 1.25x |" in text
    for table in tables(evaluation):
        assert all(len(cells) == len(table.columns) for cells in table.rows)


def test_tables_fit_a_terminal_of_80_columns(evaluation):
    for table in tables(evaluation):
        console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
        console.print(table.rich())
        text = console.file.getvalue()
        assert "…" not in text
        assert all(len(line) <= 80 for line in text.splitlines())


def test_a_claim_has_no_caveats(evaluation, task_row):
    claim = evaluation.model_copy(
        update={"tasks": (task_row("copy", num_examples=2_000, min_prompt_tokens=128),)}
    )
    assert claim.caveats == ()
    assert len(claim.model_copy(update={"dtype": "float32"}).caveats) == 1


def test_progress_in_a_log_is_lines_and_on_a_terminal_bars():
    log = io.StringIO()
    with shown_progress(Console(file=log, width=80)) as progress:
        for done in range(1, 101):
            progress("copy: likelihood", done, 100)
    assert log.getvalue().splitlines() == ["copy: likelihood: 1/100", "copy: likelihood: 100/100"]
    terminal = io.StringIO()
    with shown_progress(Console(file=terminal, width=80, force_terminal=True)) as progress:
        progress("copy: likelihood", 3, 3)
    assert re.search(r"copy: likelihood.*3/3", terminal.getvalue())
