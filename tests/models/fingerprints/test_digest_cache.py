"""A digest is computed once, and never believed of files that have changed since."""

from __future__ import annotations

import json
import os
import threading

import pytest
from safetensors.torch import load_file, save_file

from rayapp.models import checkpoint as checkpoint_module
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.fingerprints import digest_cache
from rayapp.models.fingerprints.digest_cache import CACHE_FILE
from rayapp.testbed import text_model_path


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rayapp" / "weights"


@pytest.fixture
def counted(monkeypatch, user_cache):
    """A count of how often weights were hashed; small and young files are cached like others."""
    hashed = []
    original = checkpoint_module.weights_digest

    def counting(tensors):
        hashed.append(1)
        return original(tensors)

    monkeypatch.setattr(checkpoint_module, "weights_digest", counting)
    monkeypatch.setattr(checkpoint_module, "MIN_BYTES", 0)
    monkeypatch.setattr(digest_cache, "SETTLED_S", 0.0)
    return hashed


@pytest.fixture
def path(save_tiny, tmp_path):
    return save_tiny(tmp_path, "llama")


def fingerprint(path):
    return Checkpoint(path).signature().weights_fingerprint


def changed_weights(path):
    """Another value somewhere; sizes stay."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_it_is_computed_once_and_lies_beside_the_weights(path, counted, user_cache):
    first = fingerprint(path)
    assert fingerprint(path) == fingerprint(path) == first
    assert len(counted) == 1
    assert (path / CACHE_FILE).is_file()
    assert (path / CACHE_FILE).stat().st_mode & 0o777 == 0o644
    assert not user_cache.exists()
    assert [file.name for file in path.glob(".*")] == [CACHE_FILE]


def test_settings_are_never_cached(path, counted):
    first = fingerprint(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(path) != first
    assert len(counted) == 1
    # Which tensors count is a setting too.
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert fingerprint(path) != first
    assert len(counted) == 2


def test_changed_files_are_hashed_again(path, counted):
    first, times = fingerprint(path), (path / "model.safetensors").stat()
    changed_weights(path)
    assert (path / "model.safetensors").stat().st_size == times.st_size
    second = fingerprint(path)
    assert second != first
    changed_weights(path)
    os.utime(path / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(path) not in (first, second)
    assert len(counted) == 3


def test_other_files_under_the_same_names(path, counted):
    """Another checkpoint takes the place of the directory, cache file and all."""
    first = fingerprint(path)
    other = path.parent / "other"
    path.rename(other)
    path.mkdir()
    for file in other.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
        os.utime(path / file.name, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert fingerprint(path) == first
    assert len(counted) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"scheme": "v2:"}', b"null", b'{"digest": "0"}'],
)
def test_a_damaged_cache_is_none(path, counted, content):
    first = fingerprint(path)
    whole = (path / CACHE_FILE).read_bytes()
    (path / CACHE_FILE).write_bytes(content)
    assert fingerprint(path) == first
    assert len(counted) == 2
    assert (path / CACHE_FILE).read_bytes() == whole


def test_a_cache_of_another_scheme_is_none(path, counted):
    first = fingerprint(path)
    entry = json.loads((path / CACHE_FILE).read_text())
    forged = json.dumps({**entry, "scheme": "v1:", "digest": "0" * 64})
    (path / CACHE_FILE).write_text(forged)
    assert fingerprint(path) == first
    assert len(counted) == 2


def test_the_users_cache_where_the_directory_cannot_be_written(
    path, counted, user_cache, monkeypatch
):
    original = digest_cache._write

    def unwritable(file, entry):
        if file.parent == path:
            raise PermissionError(13, "Permission denied", str(file))
        original(file, entry)

    monkeypatch.setattr(digest_cache, "_write", unwritable)
    first = fingerprint(path)
    assert fingerprint(path) == first
    assert len(counted) == 1
    assert not (path / CACHE_FILE).exists()
    assert len(list(user_cache.iterdir())) == 1
    changed_weights(path)
    assert fingerprint(path) != first


def test_without_any_place_to_write(path, counted, monkeypatch):
    def unwritable(file, entry):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(digest_cache, "_write", unwritable)
    assert fingerprint(path) == fingerprint(path)
    assert len(counted) == 2


def test_young_files_are_not_cached(path, counted, monkeypatch):
    """A change within a tick of the filesystem's clock would not show."""
    monkeypatch.setattr(digest_cache, "SETTLED_S", 3600.0)
    assert fingerprint(path) == fingerprint(path)
    assert len(counted) == 2
    assert not (path / CACHE_FILE).exists()


def test_files_that_change_while_they_are_hashed(path, counted, monkeypatch):
    original = checkpoint_module.weights_digest

    def slow(tensors):
        digest = original(tensors)
        changed_weights(path)
        return digest

    monkeypatch.setattr(checkpoint_module, "weights_digest", slow)
    fingerprint(path)
    assert not (path / CACHE_FILE).exists()


def test_many_writers_leave_a_whole_file(path, counted):
    wanted = fingerprint(path)
    found, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            (path / CACHE_FILE).unlink(missing_ok=True)
            found.append(fingerprint(path))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    stop.wait(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert {*found} == {wanted}
    fingerprint(path)
    assert [file.name for file in path.glob(".*")] == [CACHE_FILE]


def test_the_shipped_model_gets_no_file(user_cache):
    fingerprint(text_model_path())
    assert not (text_model_path() / CACHE_FILE).exists()
    assert not user_cache.exists()
