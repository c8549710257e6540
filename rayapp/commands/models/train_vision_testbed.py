"""``rayapp train-vision-testbed``: train the vision test-bed, export it and write its card."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from rayapp.commands.models.training_options import Resume, ScoreOnly


def train_vision_testbed(
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the run: its checkpoint, the model in model/, questions in data/."
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and scenes.")] = 0,
    tower_steps: Annotated[
        int | None, typer.Option(help="Steps of the first stage, the tower's.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the second stage, the answers'.")
    ] = None,
    length_steps: Annotated[
        int | None, typer.Option(help="Steps of the third stage, with any amount of background.")
    ] = None,
    word_targets: Annotated[
        bool, typer.Option(help="Draw visual tokens to the language model's own words.")
    ] = True,
    resume: Resume = False,
    score_only: ScoreOnly = False,
    export_to: Annotated[
        Path | None, typer.Option(help="Model directory to write; model/ in --out without.")
    ] = None,
    count: Annotated[
        int, typer.Option(min=0, help="Test questions per type; 0 scores none.")
    ] = 2000,
    data: Annotated[
        int, typer.Option(min=0, help="Scenes of each split but train to write as files.")
    ] = 0,
) -> None:
    """Train the small vision model that rayapp ships."""
    from rayapp.testbed.vision.card import measure, write_card
    from rayapp.testbed.vision.export import export_model
    from rayapp.testbed.vision.files import write_questions
    from rayapp.testbed.vision.recipe import Recipe
    from rayapp.testbed.vision.score import draw_asked_scenes
    from rayapp.testbed.vision.train import load_checkpoint

    logging.getLogger("rayapp").setLevel(logging.INFO)
    directory = export_to or out / "model"
    recipe = Recipe(seed=seed, word_targets=word_targets)
    lengths = {"tower": tower_steps, "answers": steps, "lengths": length_steps}
    for stage, num_steps in lengths.items():
        if num_steps is not None:
            shorter = dataclasses.replace(getattr(recipe, stage), num_steps=num_steps)
            recipe = dataclasses.replace(recipe, **{stage: shorter})
    run = load_checkpoint(out) if score_only else _trained(out, recipe, resume=resume)
    export_model(run.model, run.recipe.shape, directory)
    typer.echo(f"exported step {run.step} to {directory}")
    for split in ("heal", "calibration", "validation", "test") if data else ():
        write_questions(out / "data" / f"{split}.jsonl", draw_asked_scenes(split, data, seed=1))
    if count:
        measured = measure(directory, count=count)
        write_card(directory, run, measured)
        for task, share in measured.exact_match.items():
            typer.echo(f"{task} {share:.4f}")


def _trained(out: Path, recipe: Any, *, resume: bool) -> Any:
    from rayapp.testbed.checkpoint import has_checkpoint
    from rayapp.testbed.vision.train import load_checkpoint, start_run, train

    going_on = resume and has_checkpoint(out)
    return train(load_checkpoint(out, recipe) if going_on else start_run(recipe), out)
