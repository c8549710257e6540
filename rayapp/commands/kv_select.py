"""``rayapp kv-select`` chooses the KV of a plan that travels."""

from __future__ import annotations

import logging
from typing import Annotated, get_args

import typer

from rayapp.commands.options import command
from rayapp.plan import Encoding
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.settings import DTYPE_HELP, DType


# The plan decides decode's first step and the visual tokens that it sees.
@command(without=("first_token", "visual_tokens", "dtype"))
def kv_select(
    score: ScoreSettings,
    choice: KVSelectSettings,
    compute: ComputeSettings,
    dtype: Annotated[
        str, typer.Option(metavar=f"<{'|'.join(get_args(DType))}>", help=DTYPE_HELP)
    ] = "auto",
) -> None:
    """Choose which KV of a plan travels, and in which encoding."""
    from rayapp.pruning.progress import ProgressReport
    from rayapp.workflows import kv_select as workflow
    from rayapp.workflows.tables import kv_table
    from rayapp.workflows.terminal import show, table_console

    logging.getLogger("rayapp").setLevel(logging.INFO)
    if dtype in get_args(Encoding):  # This option's former meaning.
        typer.echo(f"--dtype {dtype} is taken as --encoding {dtype}; say so next time", err=True)
        choice = choice.model_copy(update={"encoding": dtype})
    else:
        score = ScoreSettings.checked(**{**dict(score), "dtype": dtype})
    with ProgressReport() as report:
        selection = workflow.kv_select(score, compute, choice, on_progress=report)
    show(table_console(), kv_table(selection))
    typer.echo(selection.summary(choice.out or choice.plan))
