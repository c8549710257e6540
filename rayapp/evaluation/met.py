"""A test set is met once: the next plan on it learns which others were measured before.

Choosing the best of many plans on the set that proves it flatters the winner. Choose on a
validation set; a test set is then met by one plan. Whoever measures on files of the split ``test``
leaves a line per file and plan beside the result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rayapp.evaluation.result import DataFile

MET_FILE = "tests-met.jsonl"
TEST = "test"


def meet(
    out: Path | None, split: str, files: Sequence[DataFile], fingerprint: str
) -> tuple[str, ...]:
    """Record that a plan meets files of the test split; return the other plans that met one.

    Args:
        out: The result's file; the record lies in its directory. None records nothing.
        split: The split that the data were drawn from.
        files: The files.
        fingerprint: The plan's.
    """
    if out is None or split != TEST:
        return ()
    record = out.parent / MET_FILE
    met = _read(record)
    asked = {file.sha256 for file in files}
    new = [
        {"data": file.name, "sha256": file.sha256, "plan": fingerprint}
        for file in files
        if (file.sha256, fingerprint) not in met
    ]
    if new:
        out.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(line) + "\n" for line in new)
    return tuple(sorted({plan for data, plan in met if data in asked and plan != fingerprint}))


def _read(record: Path) -> list[tuple[str, str]]:
    """Files and plans that were recorded; lines that are none are passed over."""
    found = []
    try:
        lines = record.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            fields = json.loads(line)
            found.append((str(fields["sha256"]), str(fields["plan"])))
        except (ValueError, KeyError, TypeError):
            continue
    return found
