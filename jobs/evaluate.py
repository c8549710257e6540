"""Evaluate a plan beside the dense model: ``ray job submit -- python jobs/evaluate.py ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayapp.errors import InputError
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.progress import shown_progress
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.table import markdown, visual_table
from rayapp.evaluation.visual.study import compare, study_of


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")],
    data: Annotated[list[Path], typer.Option(help="JSON lines; may be given more than once.")],
    plan: Annotated[Path | None, typer.Option(help="Plan directory; none: dense.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    split: Annotated[str, typer.Option(help="Which split the data are, for the record.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task.")] = None,
    runs: Annotated[int, typer.Option(min=0, help="Timed runs per batch size; 0: no timing.")] = 30,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    compare_visual_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Also all methods, so many tokens kept.")
    ] = None,
) -> None:
    """Dense beside plan: exact match, multiple choice, perplexity, KL, bytes and latency."""
    settings = EvaluationSettings(split=split, limit=limit, num_runs=runs, seed=seed)
    try:
        with shown_progress() as progress:
            result = evaluate(model, plan, data, settings=settings, out=out, progress=progress)
            typer.echo(markdown(result))
            if compare_visual_tokens:
                study = study_of(compare_visual_tokens)
                found = compare(model, data, study, settings=settings, progress=progress)
                typer.echo(visual_table(found).markdown())
                if beside := out or plan:
                    found.save_beside(beside)
    except InputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
