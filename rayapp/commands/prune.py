"""``rayapp prune``: a search for what each stage can do without."""

from __future__ import annotations

import logging

import typer

from rayapp.commands.options import command
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings


@command()
def prune(score: ScoreSettings, search: SearchSettings, compute: ComputeSettings) -> None:
    """Search which blocks (or parts) prefill and decode can each do without."""
    from rayapp.pruning.progress import ProgressReport
    from rayapp.workflows import prune as workflow

    logging.getLogger("rayapp").setLevel(logging.INFO)
    run = workflow.prune_front if search.pareto else workflow.prune
    with ProgressReport() as report:
        result = run(score, compute, search, on_progress=report)
    typer.echo(result.summary(search.out))
