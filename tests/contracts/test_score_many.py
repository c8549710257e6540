"""One contract, two computes: scores in this process and on Ray are equal bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import ray

from rayapp.distributed.evaluator_pool import EvaluatorPool
from rayapp.plan import KVTransfer
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.healing import HealedPair, Healing, Pair
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.naive import naive_scores
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.preparation import open_evaluator, prepare
from rayapp.pruning.scorer import Compute, LocalCompute, Scorer
from rayapp.pruning.settings import PruneSettings

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def settings(tmp_path_factory, save_tiny) -> PruneSettings:
    directory = tmp_path_factory.mktemp("contract")
    rng = random.Random(0)
    lines = [
        {"prompt": "x" * rng.randint(1, 30), "completion": "yz"[: 1 + i % 2], "task": "ab"[i % 2]}
        for i in range(9)
    ]
    file = directory / "calibration.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PruneSettings.checked(
        model=str(save_tiny(directory, "mistral")),
        calibration=str(file),
        out=str(directory / "out"),
        decode_remove=1,
        chunk_tokens=80,
        workers=2,
        kv_transfer={0: KVTransfer(first=1, last=4, encoding="int8")},
    )


@pytest.fixture(scope="module")
def ray_session():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(scope="module", params=["local", "ray"])
def compute(request, settings) -> Compute:
    calibration = prepare(settings).calibration
    if request.param == "local":
        yield LocalCompute(open_evaluator(settings, calibration))
        return
    request.getfixturevalue("ray_session")
    with EvaluatorPool(settings, calibration) as pool:
        yield pool


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    rng = random.Random(1)
    return [DENSE, *(Space(5, 1.5, 1, "part").draw(rng) for _ in range(5))]


@pytest.fixture(scope="module")
def reference(settings, candidates) -> list[Score]:
    """In this process, one candidate at a time, without a cache."""
    bare = settings.model_copy(update={"cache_bytes": 0})
    calibration = prepare(bare).calibration
    assert len(calibration.chunks) >= 3
    scorer = _scorer(bare, LocalCompute(open_evaluator(bare, calibration)))
    return [scorer.score_many([candidate])[0] for candidate in candidates]


def _scorer(settings: PruneSettings, compute: Compute) -> Scorer:
    return Scorer(prepare(settings).calibration, settings.scoring(), compute, weights="w")


def test_equal_bit_for_bit(settings, compute, candidates, reference):
    found = _scorer(settings, compute).score_many(candidates)
    assert [(s.value, s.tasks, s.lines) for s in found] == [
        (s.value, s.tasks, s.lines) for s in reference
    ]


def test_equal_to_the_naive_score(settings, compute, candidates):
    prepared = prepare(settings)
    model = open_model(settings.model)
    wanted = naive_scores(model, prepared.calibration, settings.scoring(), candidates)
    found = _scorer(settings, compute).score_many(candidates)
    for score, naive in zip(found, wanted, strict=True):
        assert abs(score.value - naive.value) <= 1e-5 * naive.value + 1e-7


def open_model(path: str | Path):
    from rayapp.models.loading import load_model

    return load_model(path).model


def test_chunks_and_repetitions(settings, compute, candidates, reference):
    scorer = _scorer(settings, compute)
    finished: list[float] = []
    some = scorer.score_many(candidates[:3], [2, 0], on_progress=finished.append)
    assert finished == sorted(finished)
    assert finished[-1] == pytest.approx(3)
    lines = sorted(i for c in (0, 2) for i in scorer.calibration.chunks[c].lines)
    for score, whole in zip(some, reference, strict=False):
        assert score.lines == tuple(whole.lines[i] for i in lines)
    again = scorer.score_many([candidates[1]] * 2, [0, 2], on_progress=finished.clear)
    assert [s.lines for s in again] == [some[1].lines] * 2
    assert finished  # nothing was computed again


def test_influence(settings, compute):
    local = LocalCompute(open_evaluator(settings, prepare(settings).calibration))
    assert compute.influence() == local.influence()


def test_gate_hessian(settings, compute):
    local = LocalCompute(open_evaluator(settings, prepare(settings).calibration))
    assert compute.gate_hessian() == local.gate_hessian()


def test_attention_mass(settings, compute):
    local = LocalCompute(open_evaluator(settings, prepare(settings).calibration))
    asked = Candidate((0, 1), (4,)), KVTransfer(first=1, last=3)
    found = compute.attention_mass(*asked)
    assert [mass.block for mass in found] == [0, 1, 3, 4]
    assert found == local.attention_mass(*asked)


def test_attention_mass_of_a_healed_plan(settings, compute):
    """A survivor with negated queries attends elsewhere, whoever measures it."""
    plan, rule = Candidate((4, 5), (4, 5)), KVTransfer(first=1, last=3)
    own = dict(open_model(settings.model).get_decoder().named_parameters())
    name = "layers.3.self_attn.q_proj.weight"
    healed = HealedPair(Pair("decode", 2, 3), {name: -own[name].detach()}, 1.0, 1.0)
    local = LocalCompute(open_evaluator(settings, prepare(settings).calibration))
    for each in (local, compute):
        each.add_healed(healed)
    asked = (plan, rule, Healing(fixed=(healed.pair,)))
    found = compute.attention_mass(*asked)
    assert found == local.attention_mass(*asked)
    before = {mass.block: mass for mass in local.attention_mass(plan, rule)}
    assert {mass.block for mass in found if mass != before[mass.block]} == {3, 4}
