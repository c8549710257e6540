"""Tables of a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"[-+]?\d")


@dataclass(frozen=True)
class Table:
    """Cells as text, row by row; columns of numbers are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table."""
        rule = ["---:" if self._is_numeric(place) else "---" for place in range(len(self.columns))]
        lines = [self.columns, rule, *self.rows]
        return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)

    def _is_numeric(self, place: int) -> bool:
        """Whether most cells of a column begin with a number, not counting empty ones."""
        cells = [row[place] for row in self.rows if row[place] not in ("", "-")]
        return 2 * sum(_NUMBER.match(cell) is not None for cell in cells) > len(cells)


def interval(value: float, bounds: Sequence[float], form: str) -> str:
    """A number with its bounds, all in one format: ``1.77 (1.40 to 2.16)``."""
    low, high = bounds
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
