"""Rows that are measured once: a benchmark of many hours goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recorder.files import write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """A directory with a file for every row that has been measured.

    Attributes:
        home: The directory; it has one for every group of rows.
        commit: The commit that new rows are measured at.
        told: Names of a row's numbers that are printed when it is measured.
    """

    home: Path
    commit: str | None
    told: Sequence[str] = ()

    def kept(self, group: str, name: str, measure: Callable[[], Row]) -> Row:
        """The row of this name, measured now if it has no file."""
        file = self.home / group / f"{name.replace(' ', '_').replace('/', '-')}.json"
        if not file.is_file():
            began_s = time.perf_counter()
            row = {"name": name} | measure() | {"commit": self.commit}
            row["row_s"] = time.perf_counter() - began_s
            write_json(file, row)
            told = "".join(f", {key} {row[key]:.4g}" for key in self.told if key in row)
            print(f"{group}: {name}{told}, {row['row_s']:.0f} s", flush=True)
        return _read(file)

    def all(self, group: str) -> dict[str, Row]:
        """All rows of a group by file name, in the order in which they were measured.

        Rows of earlier runs count, whatever the options of this run.
        """
        files = (self.home / group).glob("*.json")
        ordered = sorted(files, key=lambda file: file.stat().st_mtime_ns)
        return {file.stem: _read(file) for file in ordered}


def _read(file: Path) -> Row:
    row: Row = json.loads(file.read_text(encoding="utf-8"))
    return row
