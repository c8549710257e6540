"""Writing of files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically, and make its directory if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)


def write_json(path: Path, content: Any) -> Path:
    """Write JSON atomically, as a person can read it."""
    return write_text(path, json.dumps(content, indent=1) + "\n")
