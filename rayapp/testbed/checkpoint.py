"""The checkpoint of a training run: one file, replaced only by a complete one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in a run's directory."""


def write_checkpoint(state: dict[str, Any], directory: Path) -> None:
    """Write a run's state; an older one is replaced only once the new one is complete."""
    partial = directory / f"{CHECKPOINT}.partial"
    torch.save(state, partial)
    partial.replace(directory / CHECKPOINT)


def has_checkpoint(directory: Path) -> bool:
    """Whether a run has left a checkpoint in ``directory``."""
    return (directory / CHECKPOINT).exists()


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """Read a run's own state (a pickle, so only one that a recipe of ours wrote)."""
    state: dict[str, Any] = torch.load(directory / CHECKPOINT, weights_only=False)
    return state
