"""Scoring in this process and on Ray has one contract: all results are equal bit for bit.

The tests call what production calls, and nothing else: ``run``, ``heal``, ``add_healed``,
``measure`` and ``num_evaluators``, by themselves and under :meth:`Scorer.score_many`.
"""

from __future__ import annotations

import inspect
import random
import time
from pathlib import Path

import pytest

from rayapp.distributed.evaluator_pool import EvaluatorPool
from rayapp.errors import SearchError
from rayapp.plan import KVTransfer
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.healing import HealedUnit, Healing, Pair
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import naive_scores
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.measures.attention_mass import measure_attention_mass
from rayapp.pruning.measures.costs import measure_costs
from rayapp.pruning.measures.gate_hessian import measure_gate_hessian
from rayapp.pruning.measures.influence import measure_influence
from rayapp.pruning.preparation import Prepared, open_evaluator, open_healer
from rayapp.pruning.scorer import Compute, LocalCompute, Scorer, Work
from tests.told import Told

pytestmark = pytest.mark.ray

PAIRS = (Pair("decode", 1, 2), Pair("prefill", 2, 3))


@pytest.fixture(scope="module")
def local(told, prepared) -> LocalCompute:
    """The reference: one evaluator here, without a cache."""
    return local_compute(told.but(cache_bytes=0), prepared)


def local_compute(told: Told, prepared: Prepared) -> LocalCompute:
    here = (told.score, told.compute)
    evaluator = open_evaluator(*here, prepared.calibration)
    training = told.search.training()
    return LocalCompute(evaluator, open_healer(*here, training, evaluator, prepared.heal_data))


@pytest.fixture(scope="module", params=["local", "evaluators"])
def compute(request, told, prepared) -> Compute:
    if request.param == "local":
        yield local_compute(told, prepared)
        return
    yield request.getfixturevalue("evaluators")


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    rng = random.Random(1)
    return [DENSE, *(Space(5, 1.5, 1, "part").draw(rng) for _ in range(5))]


@pytest.fixture(scope="module")
def reference(told, prepared, local, candidates) -> list[Score]:
    """One candidate at a time."""
    assert len(prepared.calibration.chunks) >= 3
    scorer = scorer_of(told, prepared, local)
    return [scorer.score_many([candidate])[0] for candidate in candidates]


def scorer_of(told: Told, prepared: Prepared, compute: Compute) -> Scorer:
    return Scorer(prepared.calibration, told.score.scoring(), compute, weights="w")


def test_there_is_nothing_else_to_call():
    """Every public method of a compute beyond the contract needs a caller, and a test here."""
    public = {name for name in dir(Compute) if not name.startswith("_")}
    assert public == {"run", "heal", "add_healed", "measure", "num_evaluators"}
    assert {n for n in dir(LocalCompute) if not n.startswith("_")} == public
    assert {n for n in dir(EvaluatorPool) if not n.startswith("_")} == public | {"close"}
    signatures = [inspect.signature(kind.measure) for kind in (Compute, LocalCompute)]
    assert signatures == [inspect.signature(EvaluatorPool.measure)] * 2


def test_scores_are_equal_bit_for_bit(told, prepared, compute, candidates, reference):
    found = scorer_of(told, prepared, compute).score_many(candidates)
    assert [(s.value, s.tasks, s.lines) for s in found] == [
        (s.value, s.tasks, s.lines) for s in reference
    ]


def test_scores_equal_the_naive_ones(told, prepared, compute, candidates):
    model = open_model(told.score.model)
    wanted = naive_scores(model, prepared.calibration, told.score.scoring(), candidates)
    found = scorer_of(told, prepared, compute).score_many(candidates)
    for score, naive in zip(found, wanted, strict=True):
        assert abs(score.value - naive.value) <= 1e-5 * naive.value + 1e-7


def open_model(path: str | Path):
    from rayapp.models.loading import load_model

    return load_model(path).model


def test_chunks_and_repetitions(told, prepared, compute, candidates, reference):
    scorer = scorer_of(told, prepared, compute)
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


def test_every_piece_of_work_is_run_once(compute, candidates):
    work = [Work(chunk, (candidate,)) for chunk in (0, 1) for candidate in candidates[:3]]
    done = list(compute.run(work))
    assert sorted(each.work.chunk for each in done) == [0, 0, 0, 1, 1, 1]
    assert {each.work for each in done} == set(work)
    assert all(len(each.sums) == 1 and each.seconds > 0 for each in done)
    assert list(compute.run([])) == []


def test_healed_units_are_equal_bit_for_bit(compute, local):
    found = {healed.unit: healed for healed in compute.heal(PAIRS)}
    wanted = {healed.unit: healed for healed in local.heal(PAIRS)}
    assert found.keys() == wanted.keys() == set(PAIRS)
    for pair, healed in found.items():
        assert healed.weights.digest == wanted[pair].weights.digest
        assert healed.record() == wanted[pair].record()


def test_what_was_added_is_scored_with(told, prepared, compute, local):
    plan, pair = Candidate((), (2, 3)), PAIRS[0]
    [healed] = local.heal([pair])
    scores = []
    for each in (compute, local):
        scorer = scorer_of(told, prepared, each)
        [bare] = scorer.score_many([plan])
        scorer.heal_as([healed])
        [score] = scorer.score_many([plan])
        assert score.lines != bare.lines
        scores.append(score.lines)
    assert scores[0] == scores[1]


@pytest.mark.parametrize("function", [measure_influence, measure_gate_hessian])
def test_measures_are_equal_bit_for_bit(compute, local, function):
    assert compute.measure(function) == local.measure(function)


def test_measured_costs_are_those_of_the_model(compute, local):
    found, wanted = compute.measure(measure_costs), local.measure(measure_costs)
    assert (found.kv_bytes, found.sent_bytes) == (wanted.kv_bytes, wanted.sent_bytes)
    assert min(found.prefill_parts) > 0


def test_arguments_reach_a_measure(compute, local):
    asked = Candidate((0, 1), (4,)), KVTransfer(first=1, last=3)
    found = compute.measure(measure_attention_mass, *asked)
    assert [mass.block for mass in found] == [0, 1, 3, 4]
    assert found == local.measure(measure_attention_mass, *asked)


def test_a_measure_of_a_healed_plan(told, compute, local):
    """A survivor with negated queries attends elsewhere, whoever measures it.

    No test trains this pair on the evaluators, which take the tensors of a pair but once.
    """
    plan, rule = Candidate((), (0, 1)), KVTransfer(first=1, last=3)
    own = dict(open_model(told.score.model).get_decoder().named_parameters())
    name = "layers.1.self_attn.q_proj.weight"
    healed = HealedUnit(Pair("decode", 0, 1), {name: -own[name].detach()}, 1.0, 1.0)
    for each in (local, compute):
        each.add_healed(healed)
    asked = (measure_attention_mass, plan, rule, Healing(fixed=(healed.unit,)))
    found = compute.measure(*asked, units=[healed.unit])
    assert found == local.measure(*asked, units=[healed.unit])
    before = {mass.block: mass for mass in local.measure(measure_attention_mass, plan, rule)}
    assert {mass.block for mass in found if mass != before[mass.block]} == {1, 2, 3, 4}


def broken(evaluator: Evaluator) -> None:
    raise SearchError(f"nothing to measure on {len(evaluator.calibration.chunks)} chunks")


def test_an_error_of_a_measure_arrives_as_it_is(compute, prepared):
    chunks = len(prepared.calibration.chunks)
    with pytest.raises(SearchError, match=f"^nothing to measure on {chunks} chunks$"):
        compute.measure(broken)
    assert compute.measure(measure_influence)  # the evaluator is still there


def test_evaluators_are_counted_once_they_compute(compute):
    """Those that start later join while others work."""
    wanted = 1 if isinstance(compute, LocalCompute) else 2
    deadline = time.monotonic() + 120
    while compute.num_evaluators < wanted and time.monotonic() < deadline:
        list(compute.run([Work(0, (DENSE,))]))
    assert compute.num_evaluators == wanted
