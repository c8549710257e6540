"""Questions of the test-bed as a search reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rayapp.pruning.evaluator.calibration import Calibration, load_calibration
from rayapp.testbed import tasks


def drawn_lines(
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    per_task: int,
    seed: int,
    *,
    length: str,
    names: Sequence[str] = tasks.TASKS,
) -> Calibration:
    """Draw equally many fresh questions of every named task, with their answers.

    They pass through a file, because that is how a user's lines arrive.
    """
    examples = [
        example
        for name in names
        for example in tasks.generate(name, split, per_task, seed, length=length)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        tasks.write_jsonl(file, examples)
        return load_calibration(file, tokenizer)
