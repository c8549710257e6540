"""Tables of text: the same cells for terminal, Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.table import Table as RichTable

from rayapp.evaluation.result import MEAN

NAMELESS = "(no task)"
SPEEDUP = "speed-up"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table under its title in bold."""
        rule = ("---", *("---:" for _ in self.columns[1:]))
        lines = [self.columns, rule, *self.rows]
        cells = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
        ]
        return "\n".join([f"**{self.title}**", "", *cells])

    def rich(self) -> RichTable:
        """The table as rich draws it on a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            justify: Literal["left", "right"] = "right" if index else "left"
            table.add_column(column, justify=justify, overflow="ellipsis" if index else "fold")
        for row in self.rows:
            table.add_row(*row, style="bold" if row[0] in (MEAN, SPEEDUP) else None)
        return table


def signed(points: float) -> str:
    """Percentage points with their sign; zero has none."""
    return f"{points:+.2f}" if round(points, 2) else "0.00"
