"""Published tables and plain texts as objects with line numbers, like those of JSON lines.

MMLU's CSV has no header: a question, its four choices and the letter of the right one, and the
file's name is the subject. Other tables name their columns in the first row.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayapp.errors import DataError

Numbered = list[tuple[int, dict[str, Any]]]

_MMLU_COLUMNS = 6
_SPLITS = ("train", "dev", "val", "valid", "validation", "test")
_SPLIT_ENDING = re.compile(rf"[_-]({'|'.join(_SPLITS)})$")


def read_csv(path: Path) -> Numbered:
    """The rows of a table; a row without a header before it is one of MMLU."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); give a CSV in UTF-8") from None
    if not rows:
        raise DataError(f"{path}: holds no row; give a table with one question a row")
    header = rows[0][1]
    if _is_mmlu(header):
        return [(number, _mmlu(row, path, number)) for number, row in rows]
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(
                f"{path} line {number}: has {len(row)} columns, but the first row names "
                f"{len(header)}; quote cells that hold commas"
            )
    if not rows[1:]:
        raise DataError(f"{path}: holds a row of names and no other; give questions below it")
    return [(number, dict(zip(header, row, strict=True))) for number, row in rows[1:]]


def _is_mmlu(row: list[str]) -> bool:
    return len(row) == _MMLU_COLUMNS and row[-1].strip() in tuple("ABCD")


def _mmlu(row: list[str], path: Path, number: int) -> dict[str, Any]:
    if not _is_mmlu(row):
        raise DataError(
            f"{path} line {number}: has {len(row)} columns and ends with {row[-1]!r}; a row of "
            "MMLU has six, a question, four choices and a letter from A to D"
        )
    subject = _SPLIT_ENDING.sub("", path.stem)
    return {"question": row[0], "choices": row[1:5], "answer": row[5].strip(), "subject": subject}


def read_parquet(path: Path) -> Numbered:
    """The rows of a Parquet file, numbered from 1."""
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); give a Parquet file") from None
    if not rows:
        raise DataError(f"{path}: holds no row; give a table with one question a row")
    return list(enumerate(rows, start=1))


def read_text(path: Path) -> Numbered:
    """A plain text as one line of text; its task is the file's name, or its directory's.

    A file that is called after its split (``wikitext2/test.txt``) is named by its directory.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({_reason(error)}); give a text in UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: is blank; give a text")
    named = path.resolve().parent.name if path.stem.lower() in _SPLITS else path.stem
    return [(1, {"text": text, "task": named})]


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
"""Readers of files that are not JSON lines, by the ending of their names."""
