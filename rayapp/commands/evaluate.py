"""``rayapp evaluate``: dense beside plan on held-out examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rayapp.commands.options import command
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.settings import ModelSettings


@command()
def evaluate(
    model: ModelSettings,
    data: Annotated[
        list[Path],
        typer.Option(help="File of JSON lines to measure on; may be given several times."),
    ],
    settings: EvaluationSettings,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan directory or plan.json; without it, the dense model."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file that receives the result.")] = None,
    compare_visual_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Also compare all methods of visual pruning with so many tokens kept; may be "
            "given several times.",
        ),
    ] = None,
) -> None:
    """Measure dense beside plan: quality, KL, bytes and latency."""
    from rayapp.evaluation.evaluate import evaluate as measure
    from rayapp.evaluation.progress import shown_progress
    from rayapp.evaluation.table import tables, visual_table
    from rayapp.evaluation.visual.study import compare, study_of
    from rayapp.models.hub import locate
    from rayapp.workflows.terminal import show, table_console

    where = locate(model.model, model.revision).directory
    placed: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    with shown_progress() as progress:
        result = measure(where, plan, data, settings=settings, out=out, progress=progress, **placed)
    console = table_console()
    show(console, *(table.rich() for table in tables(result)))
    for caveat in result.caveats:
        console.print(f"not for quotation: {caveat}", highlight=False)
    if not compare_visual_tokens:
        return
    with shown_progress() as progress:
        study = study_of(compare_visual_tokens)
        compared = compare(where, data, study, settings=settings, progress=progress, **placed)
    show(console, visual_table(compared).rich())
    beside = out or plan
    if beside is not None:
        typer.echo(compared.save_beside(beside))
