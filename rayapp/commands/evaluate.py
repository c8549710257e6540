"""``rayapp evaluate``: dense beside plan on held-out examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rayapp.commands.options import command
from rayapp.evaluation.settings import EvaluationSettings, Spread
from rayapp.settings import ModelSettings


@command()
def evaluate(
    model: ModelSettings,
    settings: EvaluationSettings,
    spread: Spread,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of lines to measure on, or a directory of them; may be given several times."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="File whose lines are read as text for perplexity; may be given several times."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan directory or plan.json; without it, the dense model."),
    ] = None,
    plan_only: Annotated[
        bool,
        typer.Option(
            help="Count and say what would be measured, how exactly and how long; measure nothing."
        ),
    ] = False,
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
    from rayapp.evaluation.forecast import forecast
    from rayapp.evaluation.progress import shown_progress
    from rayapp.evaluation.table import tables, visual_table
    from rayapp.evaluation.visual.study import compare, study_of
    from rayapp.models.hub import locate
    from rayapp.workflows.evaluate import place_of
    from rayapp.workflows.terminal import show, table_console

    where = locate(model.model, model.revision).directory
    place, lines, texts = place_of(model, spread), data or [], text or []
    console = table_console()
    if plan_only:
        with shown_progress() as progress:
            told = forecast(where, plan, lines, texts=texts, settings=settings, place=place)
        show(console, *(table.rich() for table in told.tables()))
        console.print(told.sentence(), highlight=False)
        return
    with shown_progress() as progress:
        result = measure(
            where, plan, lines, settings=settings, place=place, out=out, texts=texts,
            progress=progress,
        )  # fmt: skip
    show(console, *(table.rich() for table in tables(result)))
    for caveat in result.caveats:
        console.print(f"not for quotation: {caveat}", highlight=False)
    if not compare_visual_tokens:
        return
    with shown_progress() as progress:
        study = study_of(compare_visual_tokens)
        placed: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        compared = compare(where, lines, study, settings=settings, progress=progress, **placed)
    show(console, visual_table(compared).rich())
    beside = out or plan
    if beside is not None:
        typer.echo(compared.save_beside(beside))
