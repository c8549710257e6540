"""The output directory of a search, on any filesystem that pyarrow can reach."""

from __future__ import annotations

from pathlib import Path

from pyarrow import fs

from rayapp.errors import InputError, SearchError


class Storage:
    """Files of one directory, created if missing.

    Args:
        location: Local path, or a URI such as ``s3://bucket/search``.

    Raises:
        InputError: The directory cannot be made or written.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        try:
            if "://" in self.location:
                self._files, self._root = fs.FileSystem.from_uri(self.location)
            else:
                self._files, self._root = fs.LocalFileSystem(), str(Path(self.location).absolute())
            self._files.create_dir(self._root, recursive=True)
            self.write_bytes(".writable", b"")
            self._files.delete_file(self._path(".writable"))
        except (OSError, ValueError, SearchError) as error:
            raise InputError(
                f"{self.location}: cannot be written ({_reason(error)}); give another --out"
            ) from None

    def exists(self, name: str) -> bool:
        """Whether a file of this name exists."""
        return self._files.get_file_info(self._path(name)).type == fs.FileType.File

    def read_text(self, name: str) -> str:
        """Read a whole file as text; bytes that are no UTF-8 are replaced."""
        return self.read_bytes(name).decode("utf-8", errors="replace")

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file."""
        with self._files.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a whole file; on a local disk it appears complete or not at all."""
        local = isinstance(self._files, fs.LocalFileSystem)
        target = self._path(f"{name}.tmp" if local else name)
        try:
            with self._files.open_output_stream(target) as stream:
                stream.write(content)
            if local:
                self._files.move(target, self._path(name))
        except OSError as error:
            raise self._failed(name, error) from None

    def append_bytes(self, name: str, content: bytes) -> None:
        """Add to the end of a file, flushed when this returns; stores without append rewrite it."""
        try:
            with self._files.open_append_stream(self._path(name)) as stream:
                stream.write(content)
        except NotImplementedError:
            before = self.read_text(name).encode() if self.exists(name) else b""
            self.write_bytes(name, before + content)
        except OSError as error:
            raise self._failed(name, error) from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _failed(self, name: str, error: OSError) -> SearchError:
        return SearchError(
            f"{self.location}/{name}: cannot be written ({_reason(error)}); what was scored "
            "before is in the journal: make room, then go on with --resume"
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
