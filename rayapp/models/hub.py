"""The location of a model: a directory of the user's, or a snapshot of a model on the Hub.

Nothing here imports torch. Safetensors, configurations, tokenizers and templates are fetched, never
pickles and never code. A snapshot is a directory like any other once it is there. Another machine
gets the same model by passing :attr:`ModelLocation.pinned` to :func:`locate`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from rayapp.errors import ModelError
from rayapp.models.formats.origin import GGUF_REMEDY, read_origin

logger = logging.getLogger(__name__)

_AT_ROOT = (
    "*.safetensors", "*.json", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*",
    "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_ALLOWED = (*_AT_ROOT, "*.jinja")
# A pattern's star matches slashes too. Folders of a repository hold other formats of the same
# weights; only templates may lie in one. `consolidated` weights are a second copy at the root.
_IGNORED = (*(f"*/{pattern}" for pattern in _AT_ROOT), "consolidated*", "pytorch_model*", ".*")

_ANSWER_S = 10.0
"""Time limit for the Hub's answer about a model's name (project default)."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Names of git revisions, except names that would lead out of the cache's directory of names.
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*")


@dataclass(frozen=True)
class ModelLocation:
    """A model's directory, and its origin if that is the Hub.

    Attributes:
        directory: The directory that :class:`rayapp.models.checkpoint.Checkpoint` reads.
        repo_id: The model's name on the Hub; None for a directory of the user's own.
        revision: The commit that lies in ``directory``; None for a directory of the user's own.
    """

    directory: Path
    repo_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The name of the model: its id, or its directory's name."""
        return self.repo_id or self.directory.absolute().name

    @property
    def pinned(self) -> str:
        """A name for :func:`locate` that gives the same model on any machine that can reach it."""
        if self.repo_id is None:
            return str(self.directory.absolute())
        return f"{self.repo_id}@{self.revision}"

    @property
    def provenance(self) -> dict[str, dict[str, str]]:
        """The entry ``model`` of a plan's provenance; empty if nothing is known of its origin."""
        if self.repo_id is not None and self.revision is not None:
            return {"model": {"id": self.repo_id, "revision": self.revision}}
        origin = read_origin(self.directory)
        return {"model": {"caption": origin.caption, "source": origin.source}} if origin else {}

    @property
    def caption(self) -> str:
        """The sentence that every result of the model repeats; empty for most models."""
        origin = read_origin(self.directory)
        return origin.caption if origin else ""


def locate(model: str | Path, revision: str | None = None) -> ModelLocation:
    """Locate a model; one that has an id and is not in the cache yet is fetched from the Hub.

    Args:
        model: A directory, an id ``owner/name``, or an id with revision, ``owner/name@commit``.
        revision: Branch, tag or commit of an id; None takes its main branch.

    Raises:
        ModelError: There is no such directory or model, or it is neither in the cache nor can be
            fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(
                f"{model} is a directory, which has no revision {revision!r}; leave --revision "
                "out, or give the model's Hub id"
            )
        return from_directory(path)
    repo_id, _, named = str(model).partition("@")
    if path.suffix.lower() == ".gguf":
        raise ModelError(f"{model}: {GGUF_REMEDY}")
    if not _is_id(repo_id):
        what = "is a file, no model directory" if path.exists() else "no such model directory"
        raise ModelError(
            f"{model}: {what}; give one with config.json and *.safetensors, or a Hub id such as "
            "owner/name"
        )
    if named and revision not in (None, named):
        raise ModelError(f"{model}: names a revision, and --revision {revision} another; give one")
    wanted = revision or named or None
    if wanted and not _REVISION.fullmatch(wanted):
        raise ModelError(
            f"{wanted!r} is no revision; give a branch, a tag or a commit of {repo_id}"
        )
    return from_directory(_snapshot(repo_id, wanted))


def from_directory(directory: str | Path) -> ModelLocation:
    """Locate an existing directory; a path in the Hub's cache tells its model and commit."""
    *_, repo, snapshots, commit = ("", "", *Path(directory).absolute().parts)
    parts = repo.split("--")
    is_snapshot = snapshots == "snapshots" and _COMMIT.fullmatch(commit)
    if is_snapshot and parts[0] == "models" and len(parts) == 3:
        return ModelLocation(Path(directory), "/".join(parts[1:]), commit)
    return ModelLocation(Path(directory))


def _is_id(name: str) -> bool:
    """True if a name can be a model's id; one without an owner looks too much like a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _snapshot(repo_id: str, revision: str | None) -> Path:
    """Return the directory of a snapshot, from the cache alone if the Hub does not answer."""
    try:
        # This call fails quickly: a download would wait for a dead network as long as the system
        # does.
        HfApi().model_info(repo_id, revision=revision, timeout=_ANSWER_S)
    except Exception as error:  # noqa: BLE001 - whatever the HTTP client raises has one remedy
        return _cached(repo_id, revision, error)
    try:
        return _download(repo_id, revision, local_files_only=False)
    except Exception as error:  # noqa: BLE001 - likewise
        raise ModelError(
            f"{repo_id}: could not be fetched whole ({_reason(error)}); repeat the command to go on"
        ) from None


def _download(repo_id: str, revision: str | None, *, local_files_only: bool) -> Path:
    directory = snapshot_download(
        repo_id,
        revision=revision,
        allow_patterns=list(_ALLOWED),
        ignore_patterns=list(_IGNORED),
        local_files_only=local_files_only,
    )
    return Path(directory)


def _cached(repo_id: str, revision: str | None, failure: Exception) -> Path:
    try:
        directory = _download(repo_id, revision, local_files_only=True)
    except Exception:  # noqa: BLE001 - missing, incomplete or unreadable: the first failure is told
        _refuse(repo_id, revision, failure)
    if not isinstance(failure, OfflineModeIsEnabled):
        logger.warning("%s: the cache is used, as the Hub said: %s", repo_id, _reason(failure))
    return directory


def _refuse(repo_id: str, revision: str | None, failure: Exception) -> NoReturn:
    """Raise a :class:`ModelError` with the cause of a failure and its remedy."""
    at = f" at revision {revision!r}" if revision else ""
    fetch = f"hf download {repo_id}" + (f" --revision {revision}" if revision else "")
    cache = f"is not in the cache, or not whole ({constants.HF_HUB_CACHE})"
    reasons: dict[type[Exception], str] = {
        OfflineModeIsEnabled: f"{cache}, and HF_HUB_OFFLINE is set; unset it, or run `{fetch}` "
        "where there is a network",
        RevisionNotFoundError: "is not on the Hub, though the model is; correct --revision",
        GatedRepoError: "is gated; accept its terms on the Hub, then set HF_TOKEN or run "
        "`hf auth login`",
        RepositoryNotFoundError: "is not on the Hub, or private; correct its name, or set HF_TOKEN",
    }
    otherwise = (
        f"{cache}, and the Hub cannot be reached ({_reason(failure)}); run `{fetch}` where there "
        "is a network, or give a directory"
    )
    reason = next((text for kind, text in reasons.items() if isinstance(failure, kind)), otherwise)
    raise ModelError(f"{repo_id}: no such directory; as a Hub id, the model{at} {reason}") from None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
