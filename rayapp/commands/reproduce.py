"""``rayapp reproduce``: the paper's tables for a model of the user's own."""

from __future__ import annotations

import logging

import typer

from rayapp.commands.options import command
from rayapp.evaluation.paper.settings import ReproduceSettings


@command()
def reproduce(settings: ReproduceSettings) -> None:
    """Make the paper's tables for your model: dense, the peers' methods and ours."""
    from rayapp.evaluation.progress import shown_progress
    from rayapp.pruning.progress import ProgressReport
    from rayapp.workflows.paper import reproduce as workflow

    logging.getLogger("rayapp").setLevel(logging.INFO)
    watch = workflow.Watch(search=ProgressReport, evaluation=shown_progress)
    if settings.count:
        typer.echo(workflow.count_work(settings, watch).table().markdown())
        return
    paper = workflow.reproduce(settings, watch)
    typer.echo(paper.markdown())
    typer.echo(f"{settings.out}/{workflow.TABLES_DIRECTORY}: paper.md, paper.csv, paper.json")
