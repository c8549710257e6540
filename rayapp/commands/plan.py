"""``rayapp plan``: commands about a plan itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayapp.commands.options import command
from rayapp.settings import ModelSource

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
    from rayapp.plan import PruningPlan
    from rayapp.workflows.tables import plan_tables
    from rayapp.workflows.terminal import show, table_console

    show(table_console(), *plan_tables(PruningPlan.load(path)))


@app.command()
@command()
def renew(
    source: ModelSource,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Plan directory or plan.json.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for a renewed copy; in place without it.")
    ] = None,
) -> None:
    """Renew a plan that names its model by an older fingerprint, which is checked first."""
    from rayapp.models.hub import locate
    from rayapp.workflows.renewal import renew as workflow

    where = locate(source.model, source.revision).directory
    typer.echo(workflow(path, model=where, out=out).summary())
