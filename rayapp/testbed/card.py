"""The model card: the recipe of the weights, and their scores, measured here."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayapp.testbed.recipe import Phase, Recipe
from rayapp.testbed.rows import standard_library_text
from rayapp.testbed.score import score
from rayapp.testbed.tasks import LENGTHS, MIN_PAIRS, TASKS, generate
from rayapp.testbed.train import Run

SCORED_LENGTHS = ("short", "long")
"""Length classes of the card's table."""

_TEXT_WINDOW = 256

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The text test-bed of rayapp

A Llama of {num_blocks} blocks over bytes with {parameters:.2f} million parameters, in bf16. It was
trained by rayapp's own recipe on rayapp's own generators, to be pruned: dense, it answers its
questions as the table below says, so what a pruning plan loses is the plan's. It knows four tasks
and nothing else; it is no assistant.

## Questions

A prompt is one line of records (pairs of a two-letter key and a three-letter value, and at most one
each of `copy`, `sort` and `add`), then the question on a line of its own. The record asked for lies
anywhere in the line. The completion is the bare answer, then the end marker (id 256).

{examples}

Token ids equal bytes; nothing is put before a prompt. In a chat, a user's message is the prompt
without its last newline, which the chat template adds.

## Scores

Greedy exact match per completion, end marker included, of the weights in this directory in bf16:
{num_examples:,} examples per task and length class from the split `test`, whose questions training
never asked (seed {score_seed}).

| task | {header} |
|---|{rule}|
{table}

Prompts hold {ranges};
for retrieval, with its {min_pairs} pairs or more, at least 116. Python standard library source that
was held out of training: {text_nats:.3f} nats per byte ({text_bytes:,} bytes, in windows of
{window}).

## Training

{steps:,} steps of about {tokens_per_step:,} tokens in {seconds:,.0f} s on two CPU cores that other
work shared, one process of one thread each; seed {seed}; task mix {mix}; {text_share:.0%} of the
rows text (the source files of the standard library of the Python that trained it). Loss on answers
and text only. Muon (learning rate {matrix_lr:g}) for matrices and AdamW ({vector_lr:g}) for the
rest; the rates rise over the first {warmup_steps} steps, follow the phases below, and fall linearly
to zero over the last {decay_steps:,}:

| from step | weight of row lengths | factor on the rates |
|---|---|---|
{phases}

Sequences of more than {longest} tokens, up to the {max_positions:,} positions that the
configuration allows, were never trained. No layer dropout, no redundant blocks, nothing that
anticipates pruning.

`jobs/train_testbed.py` repeats it up to rounding, which training amplifies; other seeds and task
mixes give independent models.
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The scores of the weights on disk.

    Attributes:
        exact_match: Share of right completions by (task, length class).
        num_examples: Number of examples behind each share.
        seed: Seed of the examples.
        text_nats: Nats per byte on held-out text.
        text_bytes: Number of bytes behind it.
    """

    exact_match: Mapping[tuple[str, str], float]
    num_examples: int
    seed: int
    text_nats: float
    text_bytes: int


def _score_cell(cell: tuple[Path, str, str, int, int]) -> float:
    """Exact match of one task and length class, in its own process."""
    directory, task, length, count, seed = cell
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return score(model, tokenizer, generate(task, "test", count, seed, length=length))


def text_nats_per_byte(directory: Path, num_windows: int) -> float:
    """Mean next-byte loss of the model on disk on text that training held out.

    Args:
        directory: A Hugging Face model directory.
        num_windows: Windows of 256 predicted bytes, spread evenly over the held-out text.

    Returns:
        Nats per byte.
    """
    text = standard_library_text(held_out=True)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    total = 0.0
    for index in range(num_windows):
        start = index * (len(text) - _TEXT_WINDOW - 1) // num_windows
        window = torch.from_numpy(text[start : start + _TEXT_WINDOW + 1].copy()).long()
        with torch.inference_mode():
            logits_TV = model(input_ids=window[None, :-1]).logits[0].double()
        total += functional.cross_entropy(logits_TV, window[1:]).item()
    return total / num_windows


def measure(directory: Path, *, count: int, seed: int = 0, processes: int = 2) -> Measurement:
    """Score the weights on disk on fresh questions of the split ``test``.

    Args:
        directory: A Hugging Face model directory.
        count: Examples per task and length class.
        seed: Seed of the examples.
        processes: Worker processes of one thread each.

    Returns:
        The scores.
    """
    names = [(task, length) for length in reversed(SCORED_LENGTHS) for task in TASKS]
    cells = [(directory, task, length, count, seed) for task, length in names]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        shares = pool.map(_score_cell, cells, chunksize=1)
    windows = 256
    nats = text_nats_per_byte(directory, windows)
    return Measurement(
        dict(zip(names, shares, strict=True)), count, seed, nats, windows * _TEXT_WINDOW
    )


def _examples() -> str:
    blocks = []
    for task in TASKS:
        example = generate(task, "test", 1, 0, length="short")[0]
        blocks.append(f"`{task}`, answer `{example.completion}`:\n\n```\n{example.prompt}```\n")
    return "\n".join(blocks).rstrip()


def _table(measured: Measurement) -> str:
    rows = []
    for task in TASKS:
        shares = (f"{measured.exact_match[task, length]:.4f}" for length in SCORED_LENGTHS)
        rows.append(f"| {task} | {' | '.join(shares)} |")
    return "\n".join(rows)


def _phase_row(phase: Phase) -> str:
    lengths = ", ".join(f"{length}: {weight:g}" for length, weight in phase.lengths.items())
    rate = f"{phase.rate:g}" + (f" to {phase.last_rate:g}" if phase.last_rate else "")
    return f"| {phase.first_step:,} | {lengths} | {rate} |"


def _training_facts(recipe: Recipe, run: Run) -> dict[str, object]:
    return {
        "num_blocks": recipe.shape.num_blocks,
        "parameters": sum(weight.numel() for weight in run.weights.values()) / 1e6,
        "steps": run.step,
        "tokens_per_step": recipe.tokens_per_shard * recipe.num_shards,
        "seconds": run.seconds,
        "seed": recipe.seed,
        "mix": ", ".join(f"{task} {weight:g}" for task, weight in recipe.task_mix.items()),
        "text_share": recipe.text_share,
        "matrix_lr": recipe.matrix_lr,
        "vector_lr": recipe.vector_lr,
        "warmup_steps": recipe.warmup_steps,
        "decay_steps": recipe.decay_steps,
        "phases": "\n".join(map(_phase_row, recipe.phases)),
        "longest": max(length for phase in recipe.phases for length in phase.lengths),
        "max_positions": recipe.shape.max_positions,
    }


def write_card(directory: Path, run: Run, measured: Measurement) -> None:
    """Write ``README.md`` beside the weights.

    Args:
        directory: The exported model.
        run: The run that made the exported weights.
        measured: The scores that ``measure`` gave for this directory.
    """
    ranges = " and ".join(
        f"{LENGTHS[length][0]} to {LENGTHS[length][1]} tokens ({length})"
        for length in SCORED_LENGTHS
    )
    card = _CARD.format(
        examples=_examples(),
        header=" | ".join(SCORED_LENGTHS),
        rule="|".join("---" for _ in SCORED_LENGTHS),
        table=_table(measured),
        num_examples=measured.num_examples,
        score_seed=measured.seed,
        ranges=ranges,
        min_pairs=MIN_PAIRS,
        text_nats=measured.text_nats,
        text_bytes=measured.text_bytes,
        window=_TEXT_WINDOW,
        **_training_facts(run.recipe, run),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
