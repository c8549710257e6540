"""``rayapp demo``: the whole loop in one go, on the shipped model or on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayapp.settings import REVISION_HELP


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory that receives data, plan, results and report.")
    ] = Path("out/demo"),
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or Hub id of another model, which answers the shipped prompts itself; "
            "the shipped model without."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
) -> None:
    """Run the whole loop on a small model, or on yours: search, evaluate, serve, ask, report."""
    from rich.console import Console

    from rayapp.errors import InputError
    from rayapp.workflows.demo.loop import run_demo
    from rayapp.workflows.demo.own_answers import own_subject

    if model is None and revision is not None:
        raise InputError(f"--revision {revision}: belongs to a --model; give both, or neither")
    run_demo(out, Console(), None if model is None else own_subject(model, revision))
