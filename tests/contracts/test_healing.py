"""Healing in this process and on Ray has one contract, even if evaluators die."""

from __future__ import annotations

import pytest
import ray

from rayapp.distributed.evaluator_pool import EvaluatorPool
from rayapp.errors import SearchError
from rayapp.plan import HEALED_FILE
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.fits import Fit
from rayapp.pruning.candidates.healing import Healing, Pair
from rayapp.pruning.healing.healed_units import HealedUnits
from rayapp.pruning.preparation import heal_context, open_evaluator, open_healer, prepare
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.storage import Storage
from rayapp.workflows.prune import prune

pytestmark = pytest.mark.ray

CANDIDATES = [DENSE, Candidate((), (2, 3)), Candidate((4, 5), (4, 5)), Candidate((6, 7), (2, 3))]
FITS = [Fit("prefill", "kv", 1, 3, 3), Fit("decode", "bridge", 1, 3, 2)]
PAIRS = [Pair("decode", 1, 2), Pair("decode", 2, 3), Pair("prefill", 2, 3), Pair("prefill", 3, 4)]
UNITS = [*PAIRS, *FITS]


def opened(settings, compute, healing=Healing.of_all(5)):  # noqa: B008 - frozen
    prepared, score = prepare(*settings), settings.score
    context = heal_context(score, settings.search.training(), prepared)
    healed = HealedUnits(Storage(settings.out), context, compute)
    scorer = Scorer(prepared.calibration, score.scoring(), compute, weights="w", healed=healed)
    scorer.heal_with(healing)
    return scorer


def local(settings):
    prepared, training = prepare(*settings), settings.search.training()
    here = (settings.score, settings.compute)
    evaluator = open_evaluator(*here, prepared.calibration)
    return LocalCompute(evaluator, open_healer(*here, training, evaluator, prepared.heal_data))


def test_tensors_are_equal_bit_for_bit(told, evaluators):
    wanted = {h.unit: (h.weights.digest, h.record()) for h in local(told).heal(UNITS)}
    found = {h.unit: (h.weights.digest, h.record()) for h in evaluators.heal(UNITS)}
    assert found == wanted
    assert len(found) == 6


@pytest.mark.parametrize("healing", [Healing.of_all(5), Healing(5, linear=True)])
def test_scores_are_equal_bit_for_bit(tmp_path, told, evaluators, healing):
    here, there = (told.but(out=str(tmp_path / name)) for name in "ab")
    wanted = opened(here, local(here), healing).score_many(CANDIDATES)
    seen: list[tuple[int, int]] = []
    scorer = opened(there, evaluators, healing)
    scorer.heal(CANDIDATES, lambda *pairs: seen.append(pairs))
    found = scorer.score_many(CANDIDATES)
    assert [s.lines for s in found] == [s.lines for s in wanted]
    assert seen == [(n, 4 - n) for n in range(5)]
    plain = Scorer(scorer.calibration, scorer.objective, evaluators, weights="w")
    bare = plain.score_many(CANDIDATES)
    assert all(a.lines != b.lines for a, b in zip(found[1:], bare[1:], strict=True))


def result_of(settings, out, **changes):
    result = prune(*settings.but(out=str(out), **changes))
    trials = [(trial.candidate, trial.score.value) for trial in result.trials]
    return result.plan.healed, trials, (out / HEALED_FILE).read_bytes()


@pytest.mark.slow
def test_workers_do_not_change_a_search(tmp_path, told, cluster):
    """The whole of a search, with evaluators that it starts and ends by itself."""
    alone = result_of(told, tmp_path / "alone", workers=0)
    assert alone[0]
    assert result_of(told, tmp_path / "two") == alone


def test_a_pair_lost_with_its_evaluator_is_trained_elsewhere(
    tmp_path, told, evaluators, caplog, monkeypatch
):
    """Killed while it heals; whoever comes in its place is sent what was trained before."""
    here, there = (told.but(out=str(tmp_path / name)) for name in "ab")
    wanted = opened(here, local(here)).score_many(CANDIDATES)
    kills, added = [], []
    assign, add = evaluators._assign, evaluators.add_healed

    def assign_and_kill(waiting) -> None:
        assign(waiting)
        busy = [(e, piece) for e, piece in evaluators._busy.values() if isinstance(piece, Pair)]
        if busy and added and not kills:
            kills.append(busy[0][1])
            ray.kill(busy[0][0].actor)

    def add_and_count(healed) -> None:
        added.append(healed.unit)
        add(healed)

    monkeypatch.setattr(evaluators, "_assign", assign_and_kill)
    monkeypatch.setattr(evaluators, "add_healed", add_and_count)
    found = opened(there, evaluators).score_many(CANDIDATES)
    assert kills
    assert [s.lines for s in found] == [s.lines for s in wanted]
    assert "an evaluator was lost" in caplog.text


@pytest.mark.slow
def test_a_pair_that_kills_every_evaluator_is_named(told, prepared, cluster, monkeypatch):
    data, training = (prepared.calibration, prepared.heal_data), told.search.training()
    compute = told.but(workers=1).compute
    with EvaluatorPool(told.score, compute, *data, training=training) as pool:
        assign = pool._assign

        def assign_and_kill(waiting) -> None:
            assign(waiting)
            for evaluator, _ in pool._busy.values():
                ray.kill(evaluator.actor)

        monkeypatch.setattr(pool, "_assign", assign_and_kill)
        with pytest.raises(SearchError, match="died while healing decode 1 into 2"):
            list(pool.heal(PAIRS[:1]))
