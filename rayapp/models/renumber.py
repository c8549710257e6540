"""Settings and tensor names of a model with fewer blocks, whose blocks are numbered anew."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_BLOCK = re.compile(r"\blayers\.(\d+)\.")


def fewer_blocks(text: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The settings of a decoder's configuration that change when only ``kept`` blocks stay.

    Lists with one entry per block lose the entries of removed blocks; other lists that happen to be
    as long, such as end tokens, stay.
    """
    before = text["num_hidden_layers"]
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key, value in text.items():
        if "layer" in key and isinstance(value, list) and len(value) == before:
            changes[key] = [value[block] for block in kept]
    # Qwen's blocks from this number on have the sliding window, if there is one.
    if "max_window_layers" in text:
        changes["max_window_layers"] = sum(b < text["max_window_layers"] for b in kept)
    return changes


def name_before(canonical: str, kept: Sequence[int]) -> str:
    """The canonical name that a tensor of the smaller model has in the larger one."""
    match = _BLOCK.match(canonical)
    return f"layers.{kept[int(match[1])]}.{canonical[match.end() :]}" if match else canonical


def renumbered(stored: str, canonical: str) -> str:
    """Rewrite a name as spelt in its checkpoint with the block number of the canonical name."""
    match = _BLOCK.match(canonical)
    return _BLOCK.sub(match[0], stored, count=1) if match else stored
