"""A check of the files that a node can read; it uses only the standard library, to be quick."""

from __future__ import annotations

import json
from pathlib import Path


def unreadable(model: str | None, plan: str | None) -> str | None:
    """The reason why this node cannot serve ``model`` with ``plan``; None if it can.

    Args:
        model: Model directory; None for a model of the Hub.
        plan: Plan directory or file.
    """
    try:
        if model is not None and not _has_weights(Path(model)):
            return f"{model}: holds no *.safetensors"
        if plan is not None:
            path = Path(plan)
            json.loads((path / "plan.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'filename', None) or model}: {error}"
    return None


def _has_weights(directory: Path) -> bool:
    """True if a model directory has weights; raises if one of its files cannot be read."""
    json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = sorted(directory.glob("*.safetensors"))
    for file in weights:
        with file.open("rb") as opened:
            opened.read(1)
    return bool(weights)
