"""Train the text test-bed, export it and write its card: ``train_testbed.py --out DIR``.

``DIR`` receives the run's checkpoint (``--resume`` goes on from it) and the model, in ``DIR/text``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from rayapp.errors import InputError
from rayapp.testbed.card import measure, write_card
from rayapp.testbed.checkpoint import has_checkpoint
from rayapp.testbed.export import export_checkpoint
from rayapp.testbed.recipe import Recipe
from rayapp.testbed.tasks import TASKS
from rayapp.testbed.train import Pace, load_checkpoint, start_run, train


def _parse_mix(text: str) -> dict[str, float]:
    """``copy=0.5,add=2`` as weights; tasks that are not named weigh 1."""
    try:
        named = {
            name: float(weight) for name, weight in (part.split("=") for part in text.split(","))
        }
    except ValueError as error:
        raise InputError(f"task_mix={text!r} is not of the form add=2,copy=0.5") from error
    return dict.fromkeys(TASKS, 1.0) | named


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the run.")] = Recipe().num_steps,
    decay_steps: Annotated[
        int | None, typer.Option(help="Steps of the final decay; at most half of all by default.")
    ] = None,
    task_mix: Annotated[str, typer.Option(help="Weights of tasks, such as add=2,copy=0.5.")] = "",
    minutes: Annotated[float | None, typer.Option(help="Decay early enough to end then.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes, 1 or 2.")] = 2,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUT.")] = False,
    score_only: Annotated[bool, typer.Option(help="Export and score, do not train.")] = False,
    export_to: Annotated[Path | None, typer.Option(help="Model directory; OUT/text.")] = None,
    count: Annotated[int, typer.Option(help="Test examples per task and length; 0: none.")] = 2000,
) -> None:
    """Train, export, score, write the card."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    directory = export_to or out / "text"
    mix = _parse_mix(task_mix) if task_mix else dict.fromkeys(TASKS, 1.0)
    decay = min(Recipe().decay_steps, steps // 2) if decay_steps is None else decay_steps
    recipe = Recipe(seed=seed, num_steps=steps, decay_steps=decay, task_mix=mix)
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


if __name__ == "__main__":
    typer.run(main)
