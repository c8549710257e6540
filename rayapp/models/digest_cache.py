"""Digests of weights that were computed before, kept beside the checkpoint or in the user's cache.

A digest is used only while every file has the size and the times that it had when it was hashed.
The time of the last change of status counts too: a file that is replaced by one of the same size
and time of writing, as copies and archives have, is noticed. Whatever is damaged, or of another
version, is no digest; writers replace the file whole, and the last one wins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rayapp.plan import FINGERPRINT_MARK

logger = logging.getLogger(__name__)

CACHE_FILE = ".rayapp-weights.json"
MIN_BYTES = 64 << 20
"""Smaller checkpoints are hashed each time: that takes no longer than a look for a file (project
default)."""

SETTLED_S = 2.0
"""Age of a file from which on a further change shows in its times: no filesystem in use counts them
in longer ticks."""

FileState = tuple[int, int, int]
"""Size in bytes, and the times of writing and of the last change of status, in nanoseconds."""


class _Entry(BaseModel):
    """What the cache file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scheme: str
    names: str
    files: dict[str, FileState]
    digest: str


@dataclass(frozen=True)
class WeightFiles:
    """The files of a checkpoint as they are now.

    Attributes:
        directory: Where they lie.
        names: Hash of what is hashed: names of tensors, and the files that they are read from.
        states: By the name of the file.
    """

    directory: Path
    names: str
    states: dict[str, FileState]

    @classmethod
    def of(cls, directory: Path, files: Iterable[Path], names: Iterable[str]) -> WeightFiles:
        """Look at files; those that are links count as what they point to.

        Args:
            directory: Of the checkpoint.
            files: Of its weights.
            names: A line on every tensor that is hashed, in any order.

        Raises:
            OSError: One of them cannot be found.
        """
        states = {}
        for file in sorted({*files}):
            status = file.stat()
            states[file.name] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        listed = hashlib.sha256("\n".join(sorted(names)).encode())
        return cls(directory, listed.hexdigest(), states)

    @property
    def num_bytes(self) -> int:
        """All files together."""
        return sum(size for size, _, _ in self.states.values())

    @property
    def is_settled(self) -> bool:
        """Whether a change that begins now shows in the times of the file."""
        newest_ns = max((max(times) for _, *times in self.states.values()), default=0)
        return time.time_ns() - newest_ns >= SETTLED_S * 1e9

    def cached_digest(self) -> str | None:
        """The digest that was kept of these very files; None where there is none."""
        wanted = (FINGERPRINT_MARK, self.names, self.states)
        for file in self._places():
            entry = _read(file)
            if entry and (entry.scheme, entry.names, entry.files) == wanted:
                return entry.digest
        return None

    def keep_digest(self, digest: str) -> None:
        """Keep a digest where that can be written: beside the files, else in the user's cache."""
        entry = _Entry(scheme=FINGERPRINT_MARK, names=self.names, files=self.states, digest=digest)
        for file in self._places():
            try:
                _write(file, entry)
            except OSError as error:
                logger.debug("%s: cannot be written (%s)", file, error)
            else:
                return

    def _places(self) -> list[Path]:
        """Where a digest may lie, the first first."""
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        named = hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()
        return [self.directory / CACHE_FILE, Path(home) / "rayapp" / "weights" / f"{named}.json"]


def _read(file: Path) -> _Entry | None:
    try:
        return _Entry.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(file: Path, entry: _Entry) -> None:
    """Replace the file whole, readable by others as weights are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(entry.model_dump(mode="json"), indent=1) + "\n")
        draft.chmod(0o644)
        draft.replace(file)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
