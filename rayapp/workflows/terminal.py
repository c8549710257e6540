"""Output for a terminal, a pipe or a file: tables are wrapped where they must be, never cut."""

from __future__ import annotations

import os
import sys

from rich.console import Console, RenderableType
from rich.table import Table

PIPE_COLUMNS = 240
"""Width of output that no terminal limits; a table takes what it needs of it (project default)."""


def table_console() -> Console:
    """A console for tables: as wide as its terminal or ``COLUMNS``, and wide in pipes and files."""
    limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if limited else Console(width=PIPE_COLUMNS)


def show(console: Console, *parts: RenderableType) -> None:
    """Print texts and tables; a cell that is too narrow for its word goes on in the next line."""
    for part in parts:
        if isinstance(part, Table):
            for column in part.columns:
                column.overflow = "fold"
        console.print(part, highlight=False if isinstance(part, str) else None)
