"""A cache of weight digests, kept beside the checkpoint or in the user's cache directory.

A digest is used only while every file has the size and the times that it had when it was hashed.
The time of the last change of status counts too, so a file that is replaced by one of the same size
and time of writing, as copies and archives have, is noticed. A cache file that is damaged or of
another version is ignored; writers replace the file whole, and the last one wins.
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
"""Size from which on a digest is cached: a smaller checkpoint is hashed as fast as a cache file is
read (project default)."""

SETTLED_S = 2.0
"""Age of a file from which on a further change shows in its times: no common filesystem has coarser
time stamps."""

FileState = tuple[int, int, int]
"""The state of a file: size in bytes, times of writing and of the last change of status in ns."""


class _Entry(BaseModel):
    """The content of the cache file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scheme: str
    names: str
    files: dict[str, FileState]
    digest: str


@dataclass(frozen=True)
class WeightFiles:
    """The files of a checkpoint as they are now.

    Attributes:
        directory: The directory of the files.
        names: Hash of the names of the tensors, and of the files that they are read from.
        states: State of every file, by its name.
    """

    directory: Path
    names: str
    states: dict[str, FileState]

    @classmethod
    def of(cls, directory: Path, files: Iterable[Path], names: Iterable[str]) -> WeightFiles:
        """Read the state of files; links count as the files that they point to.

        Args:
            directory: The directory of the checkpoint.
            files: The files of its weights.
            names: One line per tensor that is hashed, in any order.

        Raises:
            OSError: One of the files does not exist.
        """
        states = {}
        for file in sorted({*files}):
            status = file.stat()
            states[file.name] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        listed = hashlib.sha256("\n".join(sorted(names)).encode())
        return cls(directory, listed.hexdigest(), states)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all files together."""
        return sum(size for size, _, _ in self.states.values())

    @property
    def is_settled(self) -> bool:
        """True if a change that begins now will show in the times of the files."""
        newest_ns = max((max(times) for _, *times in self.states.values()), default=0)
        return time.time_ns() - newest_ns >= SETTLED_S * 1e9

    def cached_digest(self) -> str | None:
        """Return the digest that was kept of exactly these files, None if there is none."""
        wanted = (FINGERPRINT_MARK, self.names, self.states)
        for file in self._places():
            entry = _read(file)
            if entry and (entry.scheme, entry.names, entry.files) == wanted:
                return entry.digest
        return None

    def keep_digest(self, digest: str) -> None:
        """Keep a digest beside the files, or in the user's cache if that is not writable."""
        entry = _Entry(scheme=FINGERPRINT_MARK, names=self.names, files=self.states, digest=digest)
        for file in self._places():
            try:
                _write(file, entry)
            except OSError as error:
                logger.debug("%s: cannot be written (%s)", file, error)
            else:
                return

    def _places(self) -> list[Path]:
        """Cache files in which a digest may lie, in the order of preference."""
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        named = hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()
        return [self.directory / CACHE_FILE, Path(home) / "rayapp" / "weights" / f"{named}.json"]


def _read(file: Path) -> _Entry | None:
    try:
        return _Entry.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(file: Path, entry: _Entry) -> None:
    """Replace a cache file as a whole; it is readable by others, as weights are."""
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
