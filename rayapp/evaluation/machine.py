"""The environment of a measurement: versions, hardware and commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_PACKAGES = ("torch", "transformers", "numpy", "tokenizers")
_GIT_TIMEOUT_S = 5.0


class Machine(BaseModel):
    """Versions, processor, threads and commit (None outside a checkout) of one measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: dict[str, str]
    processor: str
    device: str
    num_threads: int
    commit: str | None


def this_machine(*, device: str, num_threads: int) -> Machine:
    """Describe the running process; ``num_threads`` and ``device`` come from the measurement."""
    return Machine(
        versions=_versions(),
        processor=_processor(),
        device=device,
        num_threads=num_threads,
        commit=_commit(Path(__file__).parent),
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("rayapp", *_PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _processor() -> str:
    """The processor's name: the kernel's, if it gives one, else Python's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(directory: Path) -> str | None:
    """The commit of this very file, marked if there are changes; None in an installed copy."""
    tracked = ["ls-files", "--error-unmatch", Path(__file__).name]
    if _git(directory, tracked) is None:
        return None
    return _git(directory, ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])


def _git(directory: Path, arguments: list[str]) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
