"""A short name for a set of weights, whatever the place and the float type they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

# Enough to notice any training step, cheap enough for a checkpoint on a network disk: the sampled
# chunks touch about 64 pages of a tensor, whatever its size (project default).
_NUM_CHUNKS = 16
_CHUNK_ELEMENTS = 256


# A multimodal checkpoint calls its tensors `language_model.model.layers...`, the model in memory
# `model.language_model.layers...`: containers that only group others are left out of the name.
_CONTAINERS = frozenset({"model", "language_model", "vision_model"})


def canonical_name(name: str) -> str:
    """A tensor's name without the containers that checkpoints and models nest differently."""
    return ".".join(part for part in name.split(".") if part not in _CONTAINERS)


def weights_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of names, shapes and evenly spaced samples of all tensors, in any order.

    Small tensors count whole. Samples are rounded to bfloat16, so a checkpoint and its copy in
    float32 or bfloat16 have one fingerprint. It tells checkpoints apart; it is no defence against
    forgery.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_sample(tensor).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:24]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= _NUM_CHUNKS * _CHUNK_ELEMENTS:
        return flat.cpu().contiguous()
    step = (flat.numel() - _CHUNK_ELEMENTS) // (_NUM_CHUNKS - 1)
    starts = (i * step for i in range(_NUM_CHUNKS))
    return torch.cat([flat[s : s + _CHUNK_ELEMENTS] for s in starts]).cpu()
