"""``rayapp doctor``: whether this machine, or a cluster, can do what the other commands need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayapp.commands.options import command
from rayapp.distributed.serve.settings import SizeSettings
from rayapp.errors import RequestError
from rayapp.settings import REVISION_HELP


@command()
def doctor(
    sizes: SizeSettings,
    model: Annotated[
        str | None, typer.Option(help="Model directory or Hub id that is to be looked at, too.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan that is to fit the model: its directory or plan.json.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster that is checked; without it, a local one is started."),
    ] = None,
) -> None:
    """Check whether this machine, or a cluster, can do what the other commands need.

    With --model, also whether its replicas fit their devices, from the configuration alone.
    """
    from itertools import chain

    from rich.console import Console

    from rayapp.workflows.doctor import examine
    from rayapp.workflows.sizes import examine_sizes
    from rayapp.workflows.tables import finding_line

    if plan is not None and model is None:
        raise RequestError("--plan was given without --model: a plan fits one model; give both")
    if revision is not None and model is None:
        raise RequestError(
            "--revision was given without --model: it names one of a model's; give both"
        )
    console, failed = Console(), False
    found = examine(model, plan, address, revision=revision)
    if model is not None:
        found = chain(examine_sizes(model, plan, sizes, revision=revision), found)
    for finding in found:
        console.print(finding_line(finding), highlight=False, soft_wrap=True)
        failed |= finding.status == "failed"
    if failed:
        raise typer.Exit(1)
