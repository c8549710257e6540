"""Files of lines: they are read, and every line is checked against the model of its kind.

JSON lines are the rule. A table (``.csv``, ``.parquet``) has a line per row, and a plain text
(``.txt``) is one line of text (:mod:`rayapp.data.tables`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rayapp.data.tables import READERS
from rayapp.errors import DataError

_Kind = TypeVar("_Kind", bound=BaseModel)


def read_objects(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file with their line numbers, from 1; blank lines are skipped.

    Raises:
        DataError: The file cannot be read or has no line, or a line (named) is no object.
    """
    read = READERS.get(Path(path).suffix.lower())
    if read is not None:
        return read(Path(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason}); give a file of JSON lines") from None
    numbered = enumerate(text.split("\n"), start=1)
    lines = [
        (number, _object(raw, f"{path} line {number}")) for number, raw in numbered if raw.strip()
    ]
    if not lines:
        raise DataError(
            f'{path}: holds no line; write {{"prompt": ..., "completion": ...}} per line'
        )
    return lines


def checked_line(kind: type[_Kind], fields: dict[str, Any], where: str) -> _Kind:
    """Check a line of some kind; raises :class:`DataError` with ``where`` and every broken rule."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise DataError(
            f"{where}: " + "; ".join(_explain(kind, problem) for problem in error.errors())
        ) from None


def _object(raw: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg}); write one JSON object per line"
        ) from None
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: a {type(fields).__name__}, not a JSON object; write one JSON object per line"
        )
    return fields


def _explain(kind: type[BaseModel], error: Any) -> str:
    key, message = ".".join(map(str, error["loc"])), str(error["msg"]).removeprefix("Value error, ")
    needed = [name for name, field in kind.model_fields.items() if field.is_required()]
    rules = {
        "missing": f"`{key}` is missing; every line needs {_listed(needed)}",
        "extra_forbidden": f"unknown key `{key}`; use {_listed(list(kind.model_fields))}",
        "string_too_short": f"`{key}` is empty; give at least one character",
        "string_type": f"`{key}` is not a string; put it in quotes",
    }
    return rules.get(error["type"], f"`{key}`: {message}" if key else message)


def _listed(names: Sequence[str]) -> str:
    """Items in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
