from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from rayapp.workflows.terminal import PIPE_COLUMNS, show, table_console

NAMES = [f"a_long_column_name_{number}" for number in range(8)]


def table() -> Table:
    made = Table()
    for name in NAMES:
        made.add_column(name, overflow="ellipsis")
    made.add_row(*(f"value-{number}-{'9' * 12}" for number in range(8)))
    return made


def test_output_that_no_terminal_limits_is_wide(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    show(table_console(), table())
    lines = capsys.readouterr().out.splitlines()
    assert all(name in lines[1] for name in NAMES)
    assert all(len(line) <= PIPE_COLUMNS for line in lines)


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_loses_no_character(columns):
    out = io.StringIO()
    show(Console(file=out, width=columns), table())
    text = out.getvalue()
    assert "…" not in text
    assert sum(character == "9" for character in text) == 8 * 12
    assert all(len(line) <= columns for line in text.splitlines())


def test_columns_of_the_environment_are_obeyed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert table_console().width == 60
