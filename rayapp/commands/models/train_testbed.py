"""``rayapp train-testbed``: train the text test-bed, export it and write its card."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from rayapp.commands.models.training_options import Resume, ScoreOnly
from rayapp.errors import InputError


def train_testbed(
    out: Annotated[
        Path, typer.Option(help="Directory of the run: its checkpoint, and the model in text/.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the run; those of the shipped model without."),
    ] = None,
    decay_steps: Annotated[
        int | None, typer.Option(help="Steps of the final decay; at most half of all by default.")
    ] = None,
    task_mix: Annotated[
        str, typer.Option(help="Weights of tasks, such as add=2,copy=0.5; others weigh 1.")
    ] = "",
    minutes: Annotated[
        float | None, typer.Option(help="Minutes that the run may take; it decays early enough.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=2, help="Processes that train, 1 or 2.")] = 2,
    resume: Resume = False,
    score_only: ScoreOnly = False,
    export_to: Annotated[
        Path | None, typer.Option(help="Model directory to write; text/ in --out without.")
    ] = None,
    count: Annotated[
        int, typer.Option(min=0, help="Test examples per task and length; 0 scores none.")
    ] = 2000,
) -> None:
    """Train the small text model that rayapp ships."""
    from rayapp.testbed.card import measure, write_card
    from rayapp.testbed.checkpoint import has_checkpoint
    from rayapp.testbed.export import export_checkpoint
    from rayapp.testbed.recipe import Recipe
    from rayapp.testbed.train import Pace, load_checkpoint, start_run, train

    logging.getLogger("rayapp").setLevel(logging.INFO)
    directory, usual = export_to or out / "text", Recipe()
    steps = usual.num_steps if steps is None else steps
    decay = min(usual.decay_steps, steps // 2) if decay_steps is None else decay_steps
    recipe = Recipe(seed=seed, num_steps=steps, decay_steps=decay, task_mix=_mix(task_mix))
    if score_only:
        run = load_checkpoint(out)
    else:
        going_on = resume and has_checkpoint(out)
        run = load_checkpoint(out, recipe) if going_on else start_run(recipe)
        run = train(run, out, num_ranks=ranks, pace=Pace(minutes=minutes))
    export_checkpoint(run.weights, run.recipe.shape, directory)
    typer.echo(f"exported step {run.step} to {directory}")
    if count:
        measured = measure(directory, count=count)
        write_card(directory, run, measured)
        for (task, length), share in measured.exact_match.items():
            typer.echo(f"{task} {length} {share:.4f}")


def _mix(text: str) -> dict[str, float]:
    """Parse ``copy=0.5,add=2`` as weights of tasks; tasks that are not named weigh 1."""
    from rayapp.testbed.tasks import TASKS

    pairs = [part.split("=") for part in text.split(",")] if text else []
    try:
        named = {name: float(weight) for name, weight in pairs}
    except ValueError:
        raise InputError(f"--task-mix {text}: is not of the form add=2,copy=0.5") from None
    return dict.fromkeys(TASKS, 1.0) | named
