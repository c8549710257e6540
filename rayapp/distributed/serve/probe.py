"""What a node can read, asked with the standard library alone: it must answer within seconds."""

from __future__ import annotations

import json
from pathlib import Path


def unreadable(model: str, plan: str | None) -> str | None:
    """Why this node cannot serve ``model`` with ``plan``; None where it can.

    Args:
        model: Model directory.
        plan: Plan directory or file.
    """
    try:
        directory = Path(model)
        json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            return f"{model}: holds no *.safetensors"
        for file in weights:
            with file.open("rb") as opened:
                opened.read(1)
        if plan is not None:
            path = Path(plan)
            json.loads((path / "plan.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'filename', None) or model}: {error}"
    return None
