"""Train the vision test-bed, export it and write its card: ``train_vision_testbed.py --out DIR``.

``DIR`` receives the run's checkpoint (``--resume`` goes on from it), the model, in ``DIR/model``,
and with ``--data`` files of questions and pictures, in ``DIR/data``.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated

import typer

from rayapp.testbed.checkpoint import has_checkpoint
from rayapp.testbed.vision.card import measure, write_card
from rayapp.testbed.vision.export import export_model
from rayapp.testbed.vision.files import write_questions
from rayapp.testbed.vision.recipe import Recipe
from rayapp.testbed.vision.score import draw_asked_scenes
from rayapp.testbed.vision.train import Run, load_checkpoint, start_run, train


def _trained(out: Path, recipe: Recipe, *, resume: bool) -> Run:
    going_on = resume and has_checkpoint(out)
    return train(load_checkpoint(out, recipe) if going_on else start_run(recipe), out)


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    tower_steps: Annotated[
        int, typer.Option(help="Steps of the first stage.")
    ] = Recipe().tower.num_steps,
    steps: Annotated[
        int, typer.Option(help="Steps of the second stage.")
    ] = Recipe().answers.num_steps,
    length_steps: Annotated[
        int, typer.Option(help="Steps of the third stage.")
    ] = Recipe().lengths.num_steps,
    word_targets: Annotated[
        bool, typer.Option(help="Draw visual tokens to the language model's own words.")
    ] = True,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUT.")] = False,
    score_only: Annotated[bool, typer.Option(help="Export and score, do not train.")] = False,
    export_to: Annotated[Path | None, typer.Option(help="Model directory; OUT/model.")] = None,
    count: Annotated[int, typer.Option(help="Test questions per type; 0: none.")] = 2000,
    data: Annotated[
        int, typer.Option(help="Scenes of each split but train to write as files; 0: none.")
    ] = 0,
) -> None:
    """Train, export, score, write the card."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    directory = export_to or out / "model"
    recipe = Recipe(seed=seed, word_targets=word_targets)
    recipe = dataclasses.replace(
        recipe,
        tower=dataclasses.replace(recipe.tower, num_steps=tower_steps),
        answers=dataclasses.replace(recipe.answers, num_steps=steps),
        lengths=dataclasses.replace(recipe.lengths, num_steps=length_steps),
    )
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


if __name__ == "__main__":
    typer.run(main)
