"""The house keeps its shape: rooms hold few files, and each says what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rayapp"
ROOMS = sorted({file.parent for file in PACKAGE.rglob("*.py")})
MOST_FILES = 16
MOST_LINES = 30


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(PACKAGE.parent)))
def test_a_room_holds_few_files_and_says_what_it_is_for(room):
    assert len(list(room.glob("*.py"))) <= MOST_FILES
    purpose = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert purpose
    assert len(purpose.splitlines()) <= MOST_LINES
