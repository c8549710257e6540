"""Training rows: one line of records, then as many questions about it as fit.

The first question of a row is a prompt exactly as ``rayapp.testbed.tasks`` makes it; later ones
reuse the line of records, and the end marker follows every answer, as the chat template renders a
conversation. So a row of 480 tokens carries some 70 supervised ones instead of 8, and no attention
mask is needed beside the causal one.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rayapp.testbed.tasks import (
    OPERATIONS,
    TASKS,
    Record,
    below,
    draw_operation,
    draw_pairs,
    identity_of,
    place,
    render,
    split_of,
)
from rayapp.testbed.tokens import END_ID, PAD_ID

KINDS = (*TASKS, "text")
"""Kinds of supervised token; ``Batch.kinds_BT`` has 1 + the index here, 0 elsewhere."""

_PAIR_COST = len("kd=wxy ")
_TEXT_KIND = 1 + KINDS.index("text")


@dataclass(frozen=True, slots=True)
class Batch:
    """Training rows of one length.

    Attributes:
        inputs_BT: Token ids, int64.
        targets_BT: The token after each input, int64.
        kinds_BT: Kind of each target, int64: 0 unsupervised, else 1 + index in ``KINDS``.
    """

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    kinds_BT: torch.Tensor


def _weighted(rng: random.Random, weights: Mapping[str, float]) -> str:
    position = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        position -= weight
        if position < 0:
            return name
    return name


def _draw_records(rng: random.Random, least: int, most: int) -> list[Record]:
    """The records of a training row, about ``least`` to ``most`` tokens."""
    room = least + below(rng, max(1, most - least))
    operations = []
    used = 0
    for task in sorted(OPERATIONS, key=lambda _: rng.random()):
        record = draw_operation(rng, task, "train")
        cost = len(record.shown) + 1
        if used + cost <= most and rng.random() < 0.8:
            operations.append(record)
            used += cost
    count = max(1 if operations else 2, (room - used) // _PAIR_COST)
    return place(rng, draw_pairs(rng, count), operations)


def _next_question(
    rng: random.Random, waiting: dict[str, list[Record]], mix: Mapping[str, float]
) -> Record:
    """Draw one of the questions left: its task by ``mix``, then any of that task."""
    task = _weighted(rng, {name: mix[name] for name, left in waiting.items() if left})
    left = waiting[task]
    return left.pop(below(rng, len(left)))


def draw_row(
    rng: random.Random, length: int, context: tuple[int, int], mix: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a row of records and questions, all of the training split.

    Args:
        rng: Source of the draw.
        length: Number of tokens of the row.
        context: Least and most tokens of the line of records.
        mix: Weight of every task when a question is chosen.

    Returns:
        Token ids and kinds, each ``(length,)``, int64, padded at the end.
    """
    records = _draw_records(rng, *context)
    waiting: dict[str, list[Record]] = {task: [] for task in TASKS}
    for record in records:
        waiting[record.task].append(record)
    ids = np.full(length, PAD_ID, dtype=np.int64)
    kinds = np.zeros(length, dtype=np.int64)
    head = " ".join(record.shown for record in records) + "\n"
    ids[: len(head)] = np.frombuffer(head.encode(), dtype=np.uint8)
    used = len(head)
    while any(waiting.values()):
        record = _next_question(rng, waiting, mix)
        if split_of(identity_of(record, render(records, record))) != "train":
            continue
        text = record.asked + record.answer
        end = used + len(text)
        if end >= length:
            break
        ids[used:end] = np.frombuffer(text.encode(), dtype=np.uint8)
        ids[end] = END_ID
        kinds[used + len(record.asked) : end + 1] = 1 + TASKS.index(record.task)
        used = end + 1
    return ids, kinds


def standard_library_text(*, held_out: bool) -> np.ndarray:
    """Source of the running interpreter's standard library, docstrings and all, as bytes.

    Args:
        held_out: Whether to read the tenth of the files that training never reads.

    Returns:
        The files one after another, sorted by name, ``(num_bytes,)``, uint8; ids equal bytes.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "encodings", "lib2to3"} & set(parts):
            continue
        if (split_of("/".join(parts)) == "test") == held_out:
            chosen.append(path.read_bytes())
    return np.frombuffer(b"\n".join(chosen), dtype=np.uint8)


def draw_batch(
    rng: random.Random,
    length: int,
    context: tuple[int, int],
    num_tokens: int,
    mix: Mapping[str, float],
    text: np.ndarray,
    text_share: float,
) -> Batch:
    """Draw rows of ``length`` tokens, about ``text_share`` of them plain text.

    Args:
        rng: Source of the draw.
        length: Number of tokens per row.
        context: Least and most tokens of the line of records in a row.
        num_tokens: Number of tokens of the batch, rounded down to whole rows (at least one).
        mix: Weight of every task.
        text: Bytes that text rows are cut from.
        text_share: Probability that a row is text.

    Returns:
        The batch, ``num_tokens // length`` rows.
    """
    rows = []
    for _ in range(max(1, num_tokens // length)):
        if rng.random() < text_share:
            start = below(rng, len(text) - length - 1)
            ids = text[start : start + length + 1].astype(np.int64)
            rows.append((ids, np.full(length + 1, _TEXT_KIND, dtype=np.int64)))
        else:
            rows.append(draw_row(rng, length + 1, context, mix))
    ids_BT = torch.from_numpy(np.stack([ids for ids, _ in rows]))
    kinds_BT = torch.from_numpy(np.stack([kinds for _, kinds in rows]))
    return Batch(ids_BT[:, :-1], ids_BT[:, 1:], kinds_BT[:, 1:])
