"""Calibration lines that are all equally long."""

from __future__ import annotations

import argparse
import random

from transformers import PreTrainedTokenizerBase

from rayapp.data.lines import TokenizedLine
from rayapp.pruning.evaluator.calibration import Calibration, cut
from rayapp.testbed.tasks import TASKS, generate


def equal_lines(
    tokenizer: PreTrainedTokenizerBase,
    arguments: argparse.Namespace,
    split: str,
    count: int,
    seed: int,
    *,
    chunk_tokens: int | None = None,
) -> Calibration:
    """The last tokens of real questions with their answers, in random order; tasks count alike."""
    total, wanted = arguments.prompt_tokens + arguments.continuation_tokens, count // len(TASKS)
    lines = []
    for task in TASKS:
        examples = generate(task, split, 4 * wanted, seed, length="mixed")
        rows = [
            (*tokenizer(e.prompt + e.completion)["input_ids"], tokenizer.eos_token_id)
            for e in examples
        ]
        rows = [row[-total:] for row in rows if len(row) >= total][:wanted]
        at = arguments.prompt_tokens
        lines += [TokenizedLine(row[:at], row[at:], task) for row in rows]
    random.Random(seed).shuffle(lines)
    return cut(lines, chunk_tokens=chunk_tokens or arguments.chunk_tokens)
