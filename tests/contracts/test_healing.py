"""Healing in this process and on Ray has one contract, even if evaluators die."""

from __future__ import annotations

from pathlib import Path

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
from tests.told import Told

pytestmark = pytest.mark.ray

CANDIDATES = [DENSE, Candidate((), (2, 3)), Candidate((4, 5), (4, 5)), Candidate((6, 7), (2, 3))]
FITS = [Fit("prefill", "kv", 1, 3, 3), Fit("decode", "bridge", 1, 3, 2)]
PAIRS = [Pair("decode", 1, 2), Pair("decode", 2, 3), Pair("prefill", 2, 3), Pair("prefill", 3, 4)]
UNITS = [*PAIRS, *FITS]


def write_lines(path: Path, count: int, letter: str) -> str:
    lines = [
        f'{{"prompt": "{letter * (1 + 3 * n)}", "completion": "{"yz"[: 1 + n % 2]}"}}'
        for n in range(count)
    ]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, save_tiny) -> Told:
    directory = tmp_path_factory.mktemp("healing")
    return Told.of(
        model=str(save_tiny(directory, "qwen3")),
        calibration=write_lines(directory / "calibration.jsonl", 6, "x"),
        heal_data=write_lines(directory / "heal.jsonl", 16, "w"),
        heal="all",
        heal_steps=6,
        heal_learning_rate=3e-3,
        out=str(directory / "out"),
        decode_remove=1,
        prefill_remove=1,
        evaluations=12,
        chunk_tokens=60,
    )


def opened(settings, compute, healing=Healing.of_all(5)):  # noqa: B008 - frozen
    prepared, score = prepare(*settings), settings.score
    context = heal_context(score, settings.search.training(), prepared)
    healed = HealedUnits(Storage(settings.out), context, compute)
    scorer = Scorer(prepared.calibration, score.scoring(), compute, weights="w", healed=healed)
    scorer.heal_with(healing)
    return scorer


@pytest.fixture(scope="module")
def pool(settings, cluster):
    with pool_of(settings.but(workers=2)) as running:
        yield running


def pool_of(settings) -> EvaluatorPool:
    prepared = prepare(*settings)
    return EvaluatorPool(
        settings.score,
        settings.compute,
        prepared.calibration,
        prepared.heal_data,
        training=settings.search.training(),
    )


def local(settings):
    prepared, training = prepare(*settings), settings.search.training()
    here = (settings.score, settings.compute)
    evaluator = open_evaluator(*here, prepared.calibration)
    return LocalCompute(evaluator, open_healer(*here, training, evaluator, prepared.heal_data))


def test_tensors_are_equal_bit_for_bit(settings, pool):
    wanted = {h.unit: (h.weights.digest, h.record()) for h in local(settings).heal(UNITS)}
    found = {h.unit: (h.weights.digest, h.record()) for h in pool.heal(UNITS)}
    assert found == wanted
    assert len(found) == 6


@pytest.mark.parametrize("healing", [Healing.of_all(5), Healing(5, linear=True)])
def test_scores_are_equal_bit_for_bit(tmp_path, settings, pool, healing):
    here, there = (settings.but(out=str(tmp_path / name)) for name in "ab")
    wanted = opened(here, local(here), healing).score_many(CANDIDATES)
    seen: list[tuple[int, int]] = []
    scorer = opened(there, pool, healing)
    scorer.heal(CANDIDATES, lambda *pairs: seen.append(pairs))
    found = scorer.score_many(CANDIDATES)
    assert [s.lines for s in found] == [s.lines for s in wanted]
    assert seen == [(n, 4 - n) for n in range(5)]
    plain = Scorer(scorer.calibration, scorer.objective, pool, weights="w").score_many(CANDIDATES)
    assert all(a.lines != b.lines for a, b in zip(found[1:], plain[1:], strict=True))


def result_of(settings, out, **changes):
    result = prune(*settings.but(out=str(out), **changes))
    trials = [(trial.candidate, trial.score.value) for trial in result.trials]
    return result.plan.healed, trials, (out / HEALED_FILE).read_bytes()


def test_workers_do_not_change_a_search(tmp_path, settings, cluster):
    alone = result_of(settings, tmp_path / "alone")
    assert alone[0]
    assert result_of(settings, tmp_path / "two", workers=2) == alone


def test_a_pair_lost_with_its_evaluator_is_trained_elsewhere(
    tmp_path, settings, cluster, caplog, monkeypatch
):
    """Killed while it heals; whoever comes in its place is sent what was trained before."""
    search = settings.but(out=str(tmp_path / "lost"), workers=2)
    wanted = opened(settings, local(settings)).score_many(CANDIDATES)
    kills = []
    with pool_of(search) as pool:
        assign = pool._assign

        def assign_and_kill(waiting) -> None:
            assign(waiting)
            busy = [(e, piece) for e, piece in pool._busy.values() if isinstance(piece, Pair)]
            if busy and len(kills) < 2 and (pool._healed or not kills):
                kills.append(busy[0][1])
                ray.kill(busy[0][0].actor)

        monkeypatch.setattr(pool, "_assign", assign_and_kill)
        found = opened(search, pool).score_many(CANDIDATES)
    assert len(kills) == 2
    assert [s.lines for s in found] == [s.lines for s in wanted]
    assert "an evaluator was lost" in caplog.text


@pytest.mark.slow
def test_a_pair_that_kills_every_evaluator_is_named(settings, cluster, monkeypatch):
    with pool_of(settings) as pool:
        assign = pool._assign

        def assign_and_kill(waiting) -> None:
            assign(waiting)
            for evaluator, _ in pool._busy.values():
                ray.kill(evaluator.actor)

        monkeypatch.setattr(pool, "_assign", assign_and_kill)
        with pytest.raises(SearchError, match="died while healing decode 1 into 2"):
            list(pool.heal(PAIRS[:1]))
