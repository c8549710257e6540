"""A search that trains pairs, and the evaluators on the shared cluster that many tests use for it.

Evaluators keep what they computed and were sent, and a lost one comes back, so that a test may kill
one. A pair of blocks is sent once: who makes tensors for a pair takes one that nobody trains.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayapp.plan import KVTransfer
from rayapp.pruning.preparation import Prepared, prepare
from rayapp.pruning.settings.score import ScoreSettings
from tests.told import Told


def _write(path: Path, lines: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable[..., Path]) -> Told:
    """A search of five blocks on three chunks, with healing, a transfer rule and two workers."""
    directory = tmp_path_factory.mktemp("told")
    rng = random.Random(0)
    lines = [
        {"prompt": "x" * rng.randint(1, 30), "completion": "yz"[: 1 + i % 2], "task": "ab"[i % 2]}
        for i in range(9)
    ]
    heal = [{"prompt": "w" * (1 + 3 * i), "completion": "yz"} for i in range(9)]
    return Told.of(
        model=str(save_tiny(directory, "mistral")),
        calibration=_write(directory / "calibration.jsonl", lines),
        out=str(directory / "out"),
        prefill_remove=1,
        decode_remove=1,
        evaluations=12,
        heal="all",
        heal_data=_write(directory / "heal.jsonl", heal),
        heal_steps=4,
        chunk_tokens=80,
        workers=2,
        kv_transfer={0: KVTransfer(first=1, last=4, encoding="int8")},
    )


@pytest.fixture(scope="session")
def prepared(told: Told) -> Prepared:
    """The lines of the search."""
    return prepare(*told)


@pytest.fixture(scope="session")
def evaluators(told: Told, prepared: Prepared, cluster: Any) -> Iterator[Any]:
    """The pool of two evaluators of the search."""
    from rayapp.distributed.evaluator_pool import EvaluatorPool

    data, training = (prepared.calibration, prepared.heal_data), told.search.training()
    with EvaluatorPool(told.score, told.compute, *data, training=training) as pool:
        yield pool


@pytest.fixture
def on_evaluators(evaluators: Any, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches with workers get the evaluators that are there, if they score the same."""
    from rayapp.distributed import evaluator_pool

    @contextmanager
    def opened(score: ScoreSettings, *_: object, **__: object) -> Iterator[Any]:
        assert score == told.score
        yield evaluators

    monkeypatch.setattr(evaluator_pool, "EvaluatorPool", opened)
