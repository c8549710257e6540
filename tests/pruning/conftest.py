"""A small calibration set whose rows differ in every length, and what searches on it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rayapp.data.lines import TokenizedLine
from rayapp.pruning.evaluator.calibration import Calibration, cut

END = 256


def draw_lines(count: int = 8, seed: int = 0) -> list[TokenizedLine]:
    """Random lines of two tasks, with prompts from one token to several sliding windows."""
    rng = random.Random(seed)
    return [
        TokenizedLine(
            tuple(rng.randrange(256) for _ in range(rng.choice([1, 2, 9, 10, 20, 33]))),
            (*(rng.randrange(256) for _ in range(rng.choice([1, 3, 5]))), END),
            "ab"[index % 2],
        )
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    return cut(draw_lines(), chunk_tokens=96)


@pytest.fixture(scope="session")
def few(calibration) -> Calibration:
    """Some of these lines, in several chunks, for oracles that compute token by token.

    There are prompts of one token, prompts longer than a window, and prompts of equal lengths.
    """
    chosen = cut(calibration.lines[1:6], chunk_tokens=48)
    assert len(chosen.chunks) > 1
    return chosen


@pytest.fixture(scope="session")
def write_calibration() -> Callable[..., Path]:
    """A function ``write_calibration(path, count, seed)`` that writes lines of ASCII text, two
    tasks.
    """

    def write(path: Path, count: int = 6, seed: int = 0) -> Path:
        rng = random.Random(seed)
        lines = [
            {
                "prompt": "".join(rng.choices("abcdefgh ", k=rng.randint(4, 20))),
                "completion": "".join(rng.choices("abcdefgh", k=rng.randint(1, 4))),
                "task": "xy"[index % 2],
            }
            for index in range(count)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write
