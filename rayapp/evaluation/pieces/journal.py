"""The diary of an evaluation: what was measured so far, so that an interrupted one goes on.

It lies beside the result, a JSON object a line, written as pieces are done. It belongs to one
subject: another model, plan, type or setting starts a new one. A finished evaluation leaves none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayapp.errors import InputError
from rayapp.evaluation.pieces.piece import Done, Piece, as_json, from_json

logger = logging.getLogger(__name__)

_ENDING = ".journal"


class Journal:
    """Measured pieces by their content.

    Args:
        out: The result's file; the journal lies beside it. None remembers nothing.
        subject: What all pieces are measured of; plain data.
    """

    def __init__(self, out: Path | None, subject: Mapping[str, Any]) -> None:
        self._path = None if out is None else out.with_name(out.name + _ENDING)
        self._known: dict[str, list[Any]] = {}
        if self._path is None:
            return
        header = json.dumps(dict(subject), sort_keys=True)
        lines = _lines(self._path)
        if lines[:1] == [header]:
            self._known = dict(filter(None, map(_read, lines[1:])))
            if self._known:
                logger.info("%s: going on after %d pieces", self._path, len(self._known))
        elif lines:
            logger.warning("%s: is of other settings, model or plan; begun anew", self._path)
        self._begin(header)

    def known(self, piece: Piece) -> tuple[Any, ...] | None:
        """The values that were measured of a piece; None if there are none."""
        values = self._known.get(piece.key)
        return None if values is None else tuple(from_json(piece.kind, value) for value in values)

    def add(self, done: Done) -> None:
        """Remember a measured piece, on disk before this returns."""
        if self._path is not None:
            values = [as_json(value) for value in done.values]
            self._append(json.dumps([done.piece.key, values]))
            self._known[done.piece.key] = values

    def close(self) -> None:
        """Remove the journal of a finished evaluation."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _begin(self, header: str) -> None:
        """Write the journal anew without a line that was torn."""
        assert self._path is not None, "checked before"
        lines = [header, *(json.dumps([key, values]) for key, values in self._known.items())]
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def _append(self, line: str) -> None:
        assert self._path is not None, "checked before"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _unwritable(self._path, error) from None


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror}); give another --out")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _read(line: str) -> tuple[str, list[Any]] | None:
    """A piece's key and values; None of a line that was torn as its writer died."""
    try:
        key, values = json.loads(line)
    except ValueError:
        return None
    return key, values
