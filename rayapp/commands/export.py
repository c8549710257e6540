"""``rayapp export``: one stage of a plan as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rayapp.commands.options import command
from rayapp.settings import ModelSource


@command()
def export(
    source: ModelSource,
    plan: Annotated[Path, typer.Option("--plan", help="Plan directory or plan.json.")],
    stage: Annotated[
        Literal["prefill", "decode", "unified"],
        typer.Option(help="Stage to write; unified where both stages run the same blocks."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to make for the checkpoint.")],
) -> None:
    """Write one stage of a plan as an ordinary Hugging Face checkpoint."""
    from rayapp.evaluation.progress import shown_progress
    from rayapp.export import export_stage
    from rayapp.models.hub import locate

    where = locate(source.model, source.revision).directory
    with shown_progress() as progress:
        record = export_stage(where, plan, stage, out, progress=progress)
    total = record.source.num_blocks
    typer.echo(f"{out}: {stage} with {len(record.kept_blocks)} of {total} blocks")
