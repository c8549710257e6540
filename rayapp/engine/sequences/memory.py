"""Settings of the pages of KV; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_SIZE = 16
"""Entries of a page where nothing else is said (vLLM's size on GPUs)."""


@dataclass(frozen=True)
class KVMemory:
    """How much memory the KV of running sequences gets, and in which pages.

    Args:
        num_bytes: Bytes of keys and values on all devices together. Never more are taken than
            ``max_num_seqs`` sequences of ``max_model_len`` entries fill, and by default just these.
        block_size: Entries of a page.
        aside_bytes: Bytes of host memory for the KV of sequences that are set aside; by default
            half of what the pages take.
    """

    num_bytes: int | None = None
    block_size: int = BLOCK_SIZE
    aside_bytes: int | None = None
