"""The first fingerprint of weights, which sampled them: only ``rayapp plan renew`` still needs it.

It hashed names, shapes and 16 evenly spaced chunks of every tensor. A change between the chunks, or
in a setting such as RoPE's, went unnoticed.
"""

from __future__ import annotations

import hashlib

import torch

from rayapp.models.architecture import MULTIMODAL_TYPES, text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.fingerprints.fingerprint import canonical_name

_NUM_CHUNKS = 16
_CHUNK_ELEMENTS = 256


def sampled_fingerprint(checkpoint: Checkpoint) -> str:
    """Fingerprint of the first scheme for the weights of this checkpoint, as old plans have it."""
    digest = hashlib.sha256()
    nested = checkpoint.config.model_type in MULTIMODAL_TYPES
    tied = text_config(checkpoint.config).tie_word_embeddings
    kept = [n for n in checkpoint.names() if not (tied and n.endswith("lm_head.weight"))]
    named = {canonical_name(name) if nested else name: name for name in kept}
    names = sorted(named)
    read = checkpoint.read(named[name] for name in names)
    for name, (_, tensor) in zip(names, read, strict=True):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_sample(tensor).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:24]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if flat.numel() <= _NUM_CHUNKS * _CHUNK_ELEMENTS:
        return flat.contiguous()
    step = (flat.numel() - _CHUNK_ELEMENTS) // (_NUM_CHUNKS - 1)
    starts = (i * step for i in range(_NUM_CHUNKS))
    return torch.cat([flat[s : s + _CHUNK_ELEMENTS] for s in starts])
