"""Writer of a checkpoint: a directory that appears whole, and its safetensors files.

The files are written in one pass, with one file in memory at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from rayapp.errors import InputError
from rayapp.models.checkpoint import INDEX_FILE

MAX_SHARD_BYTES = 4 * 10**9
"""Most bytes of tensors in one file, and so in memory at a time (project default)."""


def check_free(target: Path) -> None:
    """Raise :class:`InputError` if ``target`` exists and is no empty directory."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        what = "is not empty" if target.is_dir() else "is a file"
        raise InputError(f"{target}: {what}, and nothing is replaced; give another --out")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Yield a sibling of ``target``, which takes its name on success and vanishes on failure.

    Its files are on the disk before it takes the name, so not even a loss of power leaves half a
    checkpoint under it. Folders in it are not looked into for that.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        made.chmod(0o755)
        yield made
        for file in filter(Path.is_file, made.iterdir()):
            _settle(file)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _settle(file: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    opened = os.open(file, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write named tensors to files named as transformers does: one file, or several and an index.

    Args:
        directory: The existing directory for the files.
        tensors: Names and tensors; a tensor is read in its turn, and freed with its file.
        max_shard_bytes: Most bytes of tensors in one file; a larger tensor has its own file.

    Raises:
        OSError: The files cannot be written.
        SafetensorError: The files cannot be written, according to safetensors.
    """
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total_bytes = 0
    for name, tensor in tensors:
        if shard and _bytes(shard) + tensor.nbytes > max_shard_bytes:
            shards.append(_flush(shard, directory / _draft(len(shards))))
        shard[name] = tensor
        total_bytes += tensor.nbytes
    shards.append(_flush(shard, directory / _draft(len(shards))))
    names = _file_names(len(shards))
    for number, name in enumerate(names):
        (directory / _draft(number)).rename(directory / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(shard: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())


def _flush(shard: dict[str, torch.Tensor], file: Path) -> list[str]:
    """Write a shard to a file that others may read, free its tensors, and return their names."""
    save_file(shard, file, metadata={"format": "pt"})
    file.chmod(0o644)
    names = list(shard)
    shard.clear()
    return names


def _draft(number: int) -> str:
    """Temporary name of a file, until the number of files is known."""
    return f"shard-{number}"


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
