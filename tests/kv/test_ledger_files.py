"""Records of transfers as files: whole ones only, and nothing waits for a disk."""

from __future__ import annotations

import pickle
import time

import pyarrow.parquet as pq
import pytest

from rayapp.errors import InputError
from rayapp.kv import ledger_files
from rayapp.kv.ledger import Ledger, TransferRecord
from rayapp.kv.ledger_files import LedgerFiles


def record(name: str) -> TransferRecord:
    numbers = (30, 0, 1000, 300, 50, 100, 400, 200, 50, 0.0, 0.3, 0.1, 0.2, 0.1, 0.05, 1.5e-6)
    return TransferRecord(name, 0, "a", "b", *numbers)


def names_in(directory) -> list[str]:  # type: ignore[no-untyped-def]
    files = sorted(directory.glob("*.parquet"))
    return [name for file in files for name in pq.read_table(file)["request_id"].to_pylist()]


def test_records_are_written_in_time_and_in_order(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ledger_files, "MOST_RECORDS", 3)
    ledger = Ledger(files=LedgerFiles(tmp_path / "new", "one", every_s=0.05))
    for number in range(7):
        ledger.add(record(str(number)))
    until_s = time.monotonic() + 30
    while len(names_in(tmp_path / "new")) < 7:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    assert names_in(tmp_path / "new") == [str(number) for number in range(7)]
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_what_waits_is_written_at_the_end(tmp_path) -> None:  # type: ignore[no-untyped-def]
    files = LedgerFiles(tmp_path, "one")
    files.add(record("last"))
    files.flush().result(30)
    files.flush().result(30)
    assert names_in(tmp_path) == ["last"]


def test_a_ledger_pickles_without_its_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    ledger = Ledger(files=LedgerFiles(tmp_path, "one"))
    ledger.add(record("r"))
    copied = pickle.loads(pickle.dumps(ledger))
    assert copied.files is None
    assert copied == ledger


def test_a_directory_that_cannot_be_made_and_one_that_is_gone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        LedgerFiles(tmp_path / "file" / "below", "one")
    files = LedgerFiles(tmp_path / "gone", "one")
    (tmp_path / "gone").rmdir()
    files.add(record("lost"))
    files.flush().result(30)  # It is logged, and no request suffers.
