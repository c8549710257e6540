"""A calibration set from another domain than the tasks: program text."""

from __future__ import annotations

import json
import random
from pathlib import Path

from ablations.bench import Bench
from rayapp.testbed.rows import standard_library_text
from rayapp.testbed.tasks import TASKS

PROMPT_BYTES, COMPLETION_BYTES = 96, 8
"""Lengths of prompts and completions, similar to those of the tasks' short prompts and answers."""


def text_calibration(bench: Bench) -> Path:
    """As many lines as the tasks' set, cut at random from files that training never read."""
    path = bench.work / "calibration-text.jsonl"
    if not path.is_file():
        text, rng = standard_library_text(held_out=True), random.Random(bench.sizes.seed)
        count = bench.sizes.calibration_per_task * len(TASKS)
        lines: list[str] = []
        while len(lines) < count:
            start = rng.randrange(len(text) - PROMPT_BYTES - COMPLETION_BYTES)
            piece = text[start : start + PROMPT_BYTES + COMPLETION_BYTES].tobytes()
            if piece.isascii():
                words = piece.decode()
                line = {"prompt": words[:PROMPT_BYTES], "completion": words[PROMPT_BYTES:]}
                lines.append(json.dumps(line))
        path.write_text("\n".join(lines) + "\n")
    return path
