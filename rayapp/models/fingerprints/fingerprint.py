"""The fingerprint of a model: a short name for its function, whatever its place and float type.

It has two parts: a digest of every byte of the weights, and the settings that change KV
(:mod:`rayapp.models.fingerprints.kv_settings`). It tells models apart; it is no defence against
forgery. A model in bfloat16 and in float32 has the same fingerprint, so replicas compare their type
beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from rayapp.plan import FINGERPRINT_MARK

# The size of chunks is a part of the scheme: a tensor's digest is that of its chunks' digests. A
# chunk has 32 MiB, so that threads share out a large tensor, and it is never copied as a whole.
_CHUNK_ELEMENTS = 1 << 24
_MAX_THREADS = 8
"""Most threads that hash: beyond it, memory and disks are the limit (project default)."""

_LENGTH = 24
"""Number of characters of a fingerprint, its mark included. It is that of the first scheme, so that
headers of KV messages keep their size."""

# A multimodal checkpoint calls its tensors `language_model.model.layers...`, the model in memory
# `model.language_model.layers...`: containers that only group modules are left out of the name.
_CONTAINERS = frozenset({"model", "language_model", "vision_model"})


def canonical_name(name: str) -> str:
    """A tensor's name without the containers that checkpoints and models nest differently."""
    return ".".join(part for part in name.split(".") if part not in _CONTAINERS)


def model_fingerprint(settings: Mapping[str, Any], weights: str) -> str:
    """The fingerprint of a model, marked with the version of this scheme.

    Args:
        settings: The settings beside the weights that change KV, as plain JSON.
        weights: The digest that :func:`weights_digest` returns.
    """
    content = json.dumps({"settings": settings, "weights": weights}, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return f"{FINGERPRINT_MARK}{digest}"[:_LENGTH]


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of names, shapes and all elements of all tensors, in any order.

    Elements are rounded to bfloat16, so a checkpoint and its copy in float32 have one digest.
    Tensors are taken one by one; memory has a few chunks beside the current one.
    """
    chunks: dict[str, list[bytes]] = defaultdict(list)
    for name, digest in _chunk_digests(tensors):
        chunks[name].append(digest)
    whole = hashlib.sha256()
    for name in sorted(chunks):
        whole.update(f"{name}:{len(chunks[name])}:".encode())
        whole.update(b"".join(chunks[name]))
    return whole.hexdigest()


def _chunk_digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, bytes]]:
    """Generate the tensor's name with shape, and the digest, of every chunk in order."""
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    pending: deque[tuple[str, Future[bytes]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="fingerprint") as pool:
        for name, tensor in tensors:
            named = f"{name}{tuple(tensor.shape)}"
            for chunk in tensor.detach().reshape(-1).split(_CHUNK_ELEMENTS):
                if len(pending) == 2 * threads:
                    first, digest = pending.popleft()
                    yield first, digest.result()
                pending.append((named, pool.submit(_digest, chunk)))
        for named, digest in pending:
            yield named, digest.result()


def _digest(chunk: torch.Tensor) -> bytes:
    rounded = chunk.cpu().to(torch.bfloat16).contiguous()
    return hashlib.sha256(rounded.view(torch.int16).numpy().data).digest()
