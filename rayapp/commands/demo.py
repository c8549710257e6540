"""``rayapp demo``: the whole loop on the shipped model, in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory that receives data, plan, results and report.")
    ] = Path("out/demo"),
) -> None:
    """Run the whole loop on the small shipped model: search, evaluate, serve, ask, report."""
    from rich.console import Console

    from rayapp.workflows.demo import run_demo

    run_demo(out, Console())
