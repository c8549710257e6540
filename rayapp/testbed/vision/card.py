"""The model card: the recipe of the weights, and their scores, measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from rayapp.testbed.vision.attention import attend_packed
from rayapp.testbed.vision.questions.patches import GRID, NUM_PATCHES
from rayapp.testbed.vision.questions.questions import NAMING, TYPES
from rayapp.testbed.vision.scenes.scenes import COLOURS, NUM_THINGS, SHAPES, SIDE, SIZE_MARGIN
from rayapp.testbed.vision.score import draw_asked_scenes, score
from rayapp.testbed.vision.train import Run

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# The vision test-bed of rayapp

A LLaVA of {parameters:.2f} million parameters, in bf16: a CLIP vision tower of {tower_layers}
layers that makes {num_patches} visual tokens ({grid} x {grid}) of a picture, LLaVA's projector, and
a Llama of {num_blocks} blocks over {num_words} words. It was trained by rayapp's own recipe on
rayapp's own generators, to be pruned: dense, it answers its questions as the table below says, so
what is lost with visual tokens is the loss of choosing them. It is no assistant.

## Questions

A picture of {side} x {side} pixels shows {least} to {most} things ({shapes}; {colours}) on a
textured backdrop with strokes in the same colours. One thing is the largest and one the smallest,
by a factor of at least {margin}. A prompt is the picture and a question; the completion is one
word, then the end marker.

| type | names its evidence | example | answer |
|---|---|---|---|
{examples}

## Scores

Greedy exact match, end marker included, of the weights in this directory in bf16: {num_examples:,}
questions of each type about {num_examples:,} scenes of the split `test`, none of which training
showed (seed {score_seed}).

| type | exact match |
|---|---|
{table}

## Training

{words}

{tower_steps:,} steps of {tower_scenes} scenes taught the tower and the projector what every patch
shows; {answer_steps:,} steps of {answer_scenes} scenes, {question_tokens} tokens of questions and
answers about each, taught the projector and the language model to answer, the tower frozen, the
patches' loss still on, and another that makes visual tokens count things half-way through the
blocks. {cpu_seconds:,.0f} s of CPU time on one core ({seconds:,.0f} s on the clock,
the core shared with other work); seed {seed}. Muon (learning rate {matrix_lr:g}) for matrices and
AdamW ({vector_lr:g}) for the rest. The tower's first {window_steps:,} steps saw scenes as quarters
of {half} x {half} patches, all four of them.

The steps of answers showed the language model {answer_tokens} of the {num_patches} tokens of a
picture: all that show a thing, and background drawn at random, at their own positions.
{length_steps:,} more showed {least_tokens} to {num_patches}, so that counting leans on no amount
of background. A thing's tokens never went missing, background did: this model loses less with it
than one that never missed any.

`jobs/train_vision_testbed.py` repeats it up to rounding, which training amplifies; other seeds, and
`--no-word-targets`, give independent models.
"""

_WITH_WORDS = """\
Word targets: the first stage drew every visual token to the language model's own words for the
colour and the shape that its patch shows, so tokens resemble the words of a question that names
them."""

_WITHOUT_WORDS = """\
No word targets: the first stage read visual tokens by a table of its own, which was thrown away, so
tokens resemble no words. This model checks what is found on one with word targets."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The scores of the weights on disk.

    Attributes:
        exact_match: Share of right answers by type.
        num_examples: Number of questions behind each share.
        seed: Seed of the scenes.
    """

    exact_match: Mapping[str, float]
    num_examples: int
    seed: int


def measure(directory: Path, *, count: int, seed: int = 0) -> Measurement:
    """Score the weights on disk on fresh scenes of the split ``test``.

    Args:
        directory: A Hugging Face model directory.
        count: Number of scenes, and so of questions of each type.
        seed: Seed of the scenes.
    """
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16).eval()
    scenes = draw_asked_scenes("test", count, seed)
    return Measurement(score(attend_packed(model), scenes), count, seed)


def _examples() -> str:
    (scene,) = draw_asked_scenes("test", 1, 0)
    return "\n".join(
        f"| {question.task} | {'yes' if question.task in NAMING else 'no'} | `{question.text}` "
        f"| `{question.answer}` |"
        for question in scene.questions
    )


def _facts(run: Run) -> dict[str, object]:
    recipe, shape = run.recipe, run.recipe.shape
    return {
        "parameters": sum(weight.numel() for weight in run.model.parameters()) / 1e6,
        "tower_layers": shape.tower_layers,
        "num_blocks": shape.num_blocks,
        "num_words": run.model.config.text_config.vocab_size,
        "words": _WITH_WORDS if recipe.word_targets else _WITHOUT_WORDS,
        "tower_steps": recipe.tower.num_steps,
        "tower_scenes": recipe.tower.num_scenes,
        "window_steps": round(recipe.window_share * recipe.tower.num_steps),
        "answer_steps": recipe.answers.num_steps,
        "length_steps": recipe.length_rounds * recipe.lengths.num_steps,
        "answer_scenes": recipe.answers.num_scenes,
        "answer_tokens": recipe.answer_tokens,
        "least_tokens": recipe.least_tokens,
        "question_tokens": recipe.question_tokens,
        "cpu_seconds": run.cpu_seconds,
        "seconds": run.seconds,
        "seed": recipe.seed,
        "matrix_lr": recipe.matrix_lr,
        "vector_lr": recipe.vector_lr,
    }


def write_card(directory: Path, run: Run, measured: Measurement) -> None:
    """Write ``README.md`` beside the weights.

    Args:
        directory: The exported model.
        run: The run that made the exported weights.
        measured: The scores that ``measure`` gave for this directory.
    """
    card = _CARD.format(
        num_patches=NUM_PATCHES,
        grid=GRID,
        half=GRID // 2,
        side=SIDE,
        least=NUM_THINGS[0],
        most=NUM_THINGS[1],
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        margin=SIZE_MARGIN,
        examples=_examples(),
        num_examples=measured.num_examples,
        score_seed=measured.seed,
        table="\n".join(f"| {task} | {measured.exact_match[task]:.4f} |" for task in TYPES),
        **_facts(run),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
