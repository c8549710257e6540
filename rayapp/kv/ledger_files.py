"""Records of transfers as Parquet files, written beside the process's work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rayapp.errors import InputError
from rayapp.kv.ledger import TransferRecord, write_parquet

logger = logging.getLogger(__name__)
EVERY_S = 10.0
"""Longest time that a record waits for its file (project default)."""
MOST_RECORDS = 1000
"""Records of one file at most (project default)."""


class LedgerFiles:
    """Writes records to files of a directory, some at a time.

    A file has its name only once it is whole. Of a process that is killed, the records of the last
    seconds are missing; a disk that is full costs records, and never a request.

    Args:
        directory: The directory, which is made if it is missing.
        name: The first part of the names of the files, which no other process uses.
        every_s: Longest time that a record waits for its file.

    Raises:
        InputError: The directory cannot be made.
    """

    def __init__(self, directory: str | Path, name: str, *, every_s: float = EVERY_S) -> None:
        self._directory = Path(directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the ledger's directory {directory} cannot be made ({error.strerror}); choose "
                "another --ledger-dir"
            ) from None
        self._name = name
        self._every_s = every_s
        self._waiting: list[TransferRecord] = []
        self._num_files = 0
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger")

    def add(self, record: TransferRecord) -> None:
        """Have a record written soon; this returns at once."""
        with self._lock:
            self._waiting.append(record)
            if len(self._waiting) < MOST_RECORDS:
                self._start_timer()
                return
        self.flush()

    def flush(self) -> Future[None]:
        """Have all records written now; the result is there once they are."""
        with self._lock:
            records, self._waiting = self._waiting, []
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        return self._writer.submit(self._write, records)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(self._every_s, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def _write(self, records: Sequence[TransferRecord]) -> None:
        if not records:
            return
        path = self._directory / f"{self._name}-{self._num_files:06d}.parquet"
        partial = path.with_suffix(".partial")
        try:
            write_parquet(records, partial)
            partial.replace(path)
            self._num_files += 1
        except OSError as error:
            partial.unlink(missing_ok=True)
            logger.error("%d records of transfers are lost: %s", len(records), error)
