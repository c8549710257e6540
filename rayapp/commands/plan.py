"""``rayapp plan``: commands about a plan itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Show a plan, or renew one whose fingerprint is of an older kind.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Plan directory or plan.json.")],
) -> None:
    """Draw what each stage computes in each block, and which KV travels."""
    from rich.console import Console

    from rayapp.plan import PruningPlan
    from rayapp.workflows.tables import plan_tables

    Console().print(*plan_tables(PruningPlan.load(path)), sep="\n")
