"""A checkpoint directory and the index of its tensors; safetensors only, never pickles."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from rayapp.errors import ModelError
from rayapp.models.architecture import check_supported, fingerprint_names, signature_from
from rayapp.models.fingerprints.digest_cache import MIN_BYTES, WeightFiles
from rayapp.models.fingerprints.fingerprint import weights_digest
from rayapp.models.formats.origin import GGUF_REMEDY
from rayapp.models.formats.quantised import check_unquantised
from rayapp.plan import ModelSignature

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")


class Checkpoint:
    """The configuration and the tensors of one model directory; tensors are read on demand.

    Raises:
        ModelError: The directory or its configuration is missing or broken, the architecture is
            not supported, or the weights are in another format than safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelError(
                f"{self.path}: no such model directory; give one with config.json and *.safetensors"
            )
        self.config = read_config(self.path)
        check_unquantised(self.path, self.config)
        check_supported(self.config)
        self.files = _tensor_files(self.path)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.files)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)`` for each name, opening every file once."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in names:
                file = self.files.get(name)
                if file is None:
                    raise ModelError(
                        f"{self.path}: tensor {name!r} is missing; the checkpoint is incomplete"
                    )
                if file not in opened:
                    opened[file] = stack.enter_context(_open(file))
                yield name, opened[file].get_tensor(name)

    def signature(self) -> ModelSignature:
        """Return the model's signature; it reads all weights, unless they were hashed before."""
        return signature_from(self.config, self._digest())

    def _digest(self) -> str:
        """Return the digest of all weights; for large files it is kept for the next time."""
        named = fingerprint_names(self.config, self.names())
        files = self._weight_files(named)
        known = files.cached_digest() if files.num_bytes >= MIN_BYTES else None
        if known is not None:
            return known
        if files.num_bytes >= MIN_BYTES:
            logger.info("%s: hashing %.1f GB of weights", self.path, files.num_bytes / 1e9)
        is_settled = files.is_settled
        digest = weights_digest((named[key], tensor) for key, tensor in self.read(named))
        unchanged = self._weight_files(named) == files
        if files.num_bytes >= MIN_BYTES and is_settled and unchanged:
            files.keep_digest(digest)
        return digest

    def _weight_files(self, named: Mapping[str, str]) -> WeightFiles:
        """Files of the fingerprint's tensors; ``named`` comes from :func:`fingerprint_names`."""
        lines = [f"{name} is {key} of {self.files[key].name}" for key, name in named.items()]
        try:
            return WeightFiles.of(self.path, self.files.values(), lines)
        except OSError as error:
            raise ModelError(
                f"{error.filename}: cannot be read ({error.strerror}); the checkpoint is incomplete"
            ) from None


def read_config(path: Path) -> PreTrainedConfig:
    """Read the configuration of a model directory; raises :class:`ModelError` if that fails."""
    if not (path / CONFIG_FILE).is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if ggufs:
            raise ModelError(f"{path}: has no config.json, only {ggufs[0]}; {GGUF_REMEDY}")
        raise ModelError(f"{path}: has no config.json; give a Hugging Face model directory")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever a foreign parser raises is the user's file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}/config.json: cannot be used ({reason}); custom code is never run"
        ) from None


def _tensor_files(path: Path) -> dict[str, Path]:
    """Map tensor names to files, from the index or from the headers of all safetensors files."""
    index = path / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            return {name: path / Path(file).name for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ModelError(
                f"{index}: is not a safetensors index ({error}); save the model again"
            ) from None
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        content = f"only {pickles[0]}, which can run code when read" if pickles else "no weights"
        raise ModelError(
            f"{path}: has {content}; save it with safetensors (`model.save_pretrained`)"
        )
    return {name: file for file in files for name in _names_in(file)}


def _names_in(file: Path) -> list[str]:
    with _open(file) as opened:
        return list(opened.keys())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read as safetensors ({error})") from None
