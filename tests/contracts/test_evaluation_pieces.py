"""Pieces of an evaluation: this process and evaluators on Ray measure the same, to the digit."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
from pathlib import Path

import pytest

from rayapp.distributed.measuring_pool import MeasuringPool
from rayapp.evaluation.evaluate import checked_inputs
from rayapp.evaluation.pieces.compute import HERE, LocalPieces, PieceCompute, Subject
from rayapp.evaluation.pieces.measurer import Measurer
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.sides import Sides
from rayapp.models.loading import read_signature
from rayapp.plan import KVTransfer, Mode, PruningPlan, StagePlan
from rayapp.settings import ModelSettings

pytestmark = pytest.mark.ray

SETTINGS = EvaluationSettings(
    num_runs=0, num_window_tokens=40, num_rollouts=2, max_rollout_tokens=6, num_resamples=100
)


@pytest.fixture(scope="module")
def home(tmp_path_factory, save_tiny) -> Path:
    return save_tiny(tmp_path_factory.mktemp("pieces"), "llama")


@pytest.fixture(scope="module")
def plan(home) -> PruningPlan:
    return PruningPlan(
        model=read_signature(home),
        prefill=StagePlan(blocks={1: Mode.KV_ONLY}),
        decode=StagePlan(blocks={3: Mode.REMOVED}),
        kv_transfer={0: KVTransfer(encoding="int8")},
    )


@pytest.fixture(scope="module")
def inputs(home, plan, tmp_path_factory):
    rng = random.Random(3)

    def words(count: int) -> str:
        return "".join(rng.choices("abcdef", k=count))

    lines = [{"prompt": words(9), "completion": words(2), "task": "copy"} for _ in range(5)]
    lines += [
        {"prompt": words(7 + n % 2), "choices": [words(3), words(4)], "answer": 0, "task": "choose"}
        for n in range(5)
    ]
    lines += [{"text": words(150), "task": "text"}]
    path = tmp_path_factory.mktemp("data") / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return checked_inputs(home, plan, [path], [], SETTINGS)


@pytest.fixture(scope="module", params=["local", "cluster"])
def compute(request, inputs, home) -> PieceCompute:
    subject: Subject = inputs[1]
    if request.param == "local":
        with HERE.open(subject) as pieces:
            yield pieces
        return
    request.getfixturevalue("cluster")
    with MeasuringPool(ModelSettings(model=str(home)), subject, workers=2) as pool:
        yield pool


def measured(compute: PieceCompute, inputs) -> list[object]:
    plan, _, data = inputs
    measurer = Measurer(compute, plan, SETTINGS)
    return [
        *(measurer.completions(task, lines) for task, lines in data.completions.items()),
        *(measurer.choices(task, lines) for task, lines in data.choices.items()),
        *(measurer.texts(task, windows) for task, windows in data.texts.items()),
        *(measurer.rollouts(task, openings) for task, openings in data.openings.items()),
    ]


@pytest.fixture(scope="module")
def reference(inputs) -> str:
    with HERE.open(inputs[1]) as pieces:
        return without_times(measured(pieces, inputs))


def without_times(found: list[object]) -> str:
    """Everything that was measured, in words, without a transfer's name and its seconds."""
    unlike = r"(request_id|queue_s|prefill_s|put_s|fetch_s|copy_s|hidden_s|gb_per_s)=[^,)]*"
    return re.sub(unlike, "", "\n".join(map(repr, found)))


def test_there_is_nothing_else_to_call():
    public = {name for name in dir(PieceCompute) if not name.startswith("_")}
    assert public == {"use", "run", "measure", "num_evaluators"}
    assert {n for n in dir(LocalPieces) if not n.startswith("_")} == public
    assert {n for n in dir(MeasuringPool) if not n.startswith("_")} == public | {"close"}
    kinds = (PieceCompute, LocalPieces, MeasuringPool)
    assert len({str(inspect.signature(kind.measure)) for kind in kinds}) == 1


def test_values_are_equal_to_the_digit(compute, inputs, reference):
    assert without_times(measured(compute, inputs)) == reference


def test_another_plan_is_put_beside_dense(compute, inputs):
    lines = inputs[2].completions["copy"]
    cut = Measurer(compute, inputs[0], SETTINGS).completions("copy", lines)
    nothing = Measurer(compute, PruningPlan(), SETTINGS).completions("copy", lines)
    assert sum(line.kl for line in cut.likelihoods) > 0
    assert sum(abs(line.kl) for line in nothing.likelihoods) < 1e-9


def test_a_function_is_measured_with_both_sides(compute, inputs):
    compute.use(inputs[0])
    dense = compute.measure(Sides.prompt_bytes, [30], side="dense")
    assert dense.bytes_sent > compute.measure(Sides.prompt_bytes, [30]).bytes_sent


def die_once(sides: Sides, marker: Path) -> int:
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return sides.loaded.signature.num_blocks


@pytest.mark.slow
def test_what_a_lost_evaluator_held_is_measured_on_another(
    inputs, home, tmp_path, reference, cluster, caplog
):
    with MeasuringPool(ModelSettings(model=str(home)), inputs[1], workers=2) as pool:
        pool.use(inputs[0])
        assert pool.measure(die_once, tmp_path / "marker") == inputs[0].model.num_blocks
        assert without_times(measured(pool, inputs)) == reference
    assert "an evaluator was lost" in caplog.text
