"""Options that mean the same for both test-beds."""

from __future__ import annotations

from typing import Annotated

import typer

Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")]
ScoreOnly = Annotated[
    bool, typer.Option("--score-only", help="Export and score the checkpoint, train nothing.")
]
