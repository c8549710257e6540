from __future__ import annotations

import pytest
from pyarrow import fs

from rayapp.errors import InputError, SearchError
from rayapp.pruning.storage import Storage


def test_write_append_read(tmp_path):
    storage = Storage(tmp_path / "new" / "directory")
    assert not storage.exists("a")
    storage.append_bytes("a", b"one\n")
    storage.append_bytes("a", b"two\n")
    assert storage.read_text("a") == "one\ntwo\n"
    storage.write_bytes("a", b"three")
    assert storage.read_text("a") == "three"
    assert [p.name for p in (tmp_path / "new" / "directory").iterdir()] == ["a"]


def test_uris(tmp_path):
    storage = Storage(f"file://{tmp_path}/out")
    storage.write_bytes("a", b"x")
    assert (tmp_path / "out" / "a").read_bytes() == b"x"


class _NoAppend:
    """A filesystem without append, such as S3: objects are put whole."""

    def __init__(self) -> None:
        self._inner = fs.LocalFileSystem()

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def open_append_stream(self, path):
        raise NotImplementedError


def test_stores_without_append(tmp_path):
    storage = Storage(tmp_path)
    storage._files = _NoAppend()
    storage.append_bytes("a", b"one\n")
    storage.append_bytes("a", b"two\n")
    assert (tmp_path / "a").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("location", ["{file}/out", "nosuchscheme://x/y"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path, location):
    (tmp_path / "file").write_text("")
    location = location.format(file=tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written") as error:
        Storage(location)
    assert location in str(error.value)


def test_a_full_disk_is_named(tmp_path):
    storage = Storage(tmp_path)
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    with pytest.raises(SearchError, match="go on with --resume"):
        storage.append_bytes("journal.jsonl", b"x" * 10_000)
