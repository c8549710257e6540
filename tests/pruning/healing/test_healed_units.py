"""Pairs are trained once, kept by content; searches that heal write plans that serve."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayapp.errors import DataError, InputError, PlanError
from rayapp.evaluation.measures.likelihood import TwoStages, likelihoods
from rayapp.models.loading import load_model
from rayapp.plan import HEALED_FILE, STAGES, PruningPlan
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.healing import Healing, Pair
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.objective import combine
from rayapp.pruning.healing.healed_units import HealedUnits, units_of_plan
from rayapp.pruning.preparation import heal_context, open_evaluator, open_healer, prepare
from rayapp.pruning.progress import SearchProgress
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.search.run import SearchResult, run_search
from rayapp.pruning.storage import Storage
from rayapp.workflows.prune import prune, prune_front
from tests.told import Told


@pytest.fixture(scope="module")
def settings(tmp_path_factory, save_tiny, write_calibration) -> Told:
    directory = tmp_path_factory.mktemp("healed")
    return Told.of(
        model=str(save_tiny(directory, "llama")),
        calibration=str(write_calibration(directory / "calibration.jsonl")),
        heal_data=str(write_calibration(directory / "heal.jsonl", 16, seed=9)),
        heal="all",
        heal_steps=4,
        heal_learning_rate=3e-3,
        out=str(directory / "undisturbed"),
        prefill_remove=1,
        decode_remove=2,
        evaluations=12,
        generation_size=4,
    )


class Counting(LocalCompute):
    """Counts the trained pairs, and stops after ``limit`` of them as a kill would."""

    trained: list[Pair]
    limit: int | None = None

    def heal(self, pairs):
        for healed in super().heal(pairs):
            if self.limit is not None and len(self.trained) >= self.limit:
                raise KeyboardInterrupt
            self.trained.append(healed.unit)
            yield healed


def search(settings, limit=None, on_progress=None) -> tuple[SearchResult, Counting]:
    prepared, training = prepare(*settings), settings.search.training()
    score, here = settings.score, settings.compute
    evaluator = open_evaluator(score, here, prepared.calibration)
    healer = open_healer(score, here, training, evaluator, prepared.heal_data)
    compute = Counting(evaluator, healer)
    compute.trained, compute.limit = [], limit
    context = heal_context(score, training, prepared)
    healed = HealedUnits(Storage(settings.out), context, compute)
    scorer = Scorer(prepared.calibration, score.scoring(), compute, weights="w", healed=healed)
    found = run_search(score, settings.search, scorer, prepared.signature, on_progress=on_progress)
    return found, compute


@pytest.fixture(scope="module")
def moments() -> list[SearchProgress]:
    return []


@pytest.fixture(scope="module")
def undisturbed(settings, moments) -> tuple[SearchResult, Counting]:
    return search(settings, on_progress=moments.append)


def elsewhere(settings: Told, out: Path, **changes) -> Told:
    return settings.but(out=str(out), **changes)


def same(result: SearchResult) -> tuple[object, ...]:
    trials = [(trial.candidate, trial.score.value) for trial in result.trials]
    return result.plan.fingerprint, result.score.value, trials


def test_what_is_written(settings, undisturbed, moments):
    result, compute = undisturbed
    out = settings.out
    plan = PruningPlan.load(out)
    assert plan == result.plan
    assert plan.healed
    assert plan.directory == result.plan.directory == out
    candidate = Candidate.from_plan(plan)
    pairs = Healing.of_all(5).pairs(candidate)
    recorded = [(r["stage"], r["removed"], r["survivor"]) for r in plan.provenance["healed"]]
    assert recorded == [(p.stage, p.removed, p.survivor) for p in pairs]
    assert all(
        0 < r["relative_mse_after"] <= r["relative_mse_before"] for r in plan.provenance["healed"]
    )
    assert [healed.unit for healed in sorted(units_of_plan(plan), key=lambda h: h.unit)] == [*pairs]
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    rows = [r for r in rows if r["prefill_removed"] == 1 and r["decode_removed"] == 2]
    best = min(rows, key=lambda r: r["score"])
    assert best["healed"] == [str(pair) for pair in pairs]
    assert len(compute.trained) == len({*compute.trained}) == len(list((out / "healed").iterdir()))
    assert any(m.units and m.units[0] and "healing (" in m.line() for m in moments)


def test_evaluation_scores_the_written_plan_as_the_search_did(settings, undisturbed):
    plan = PruningPlan.load(settings.out)
    model = load_model(settings.score.model).model
    prepared = prepare(*settings)
    lines = prepared.calibration.lines
    dense, served = TwoStages(model, PruningPlan()), TwoStages(model, plan)
    sums = {index: found.kl for index, found in likelihoods(dense, served, lines)}
    score = combine(settings.score.scoring(), prepared.calibration, sums, name="plan").value
    wanted = undisturbed[0].score.value
    assert abs(score - wanted) <= 1e-5 * wanted + 1e-7
    bare = TwoStages(model, plan.with_healed(None))
    assert {i: found.kl for i, found in likelihoods(dense, bare, lines)} != sums
    evaluator = Evaluator(model, prepared.calibration, settings.score.scoring())
    fixed = units_of_plan(plan)
    for healed in fixed:
        evaluator.add_healed(healed)
    healing = Healing(fixed=tuple(healed.unit for healed in fixed))
    found = evaluator.line_sums([Candidate.from_plan(plan)], 0, healing)[0]
    chunk_lines = prepared.calibration.chunks[0].lines
    assert found == pytest.approx([sums[line] for line in chunk_lines], rel=1e-4, abs=1e-6)


def test_maps_are_searched_with_written_and_served(settings, tmp_path):
    changes = {"heal": "linear", "prefill_remove": 2, "decode_remove": 1, "evaluations": 6}
    result, compute = search(elsewhere(settings, tmp_path, **changes))
    plan = PruningPlan.load(tmp_path)
    candidate = Candidate.from_plan(plan)
    units = Healing(5, linear=True).units(candidate)
    assert [healed.unit for healed in sorted(units_of_plan(plan), key=lambda h: h.unit)] == sorted(
        units
    )
    bare = PruningPlan.model_validate({**dict(plan), "provenance": {}})
    unrecorded = units_of_plan(bare.with_healed(plan.healed, plan.directory))
    assert {healed.unit for healed in unrecorded} == {*units}
    model = load_model(settings.score.model).model
    lines = prepare(*settings).calibration.lines
    dense, served = TwoStages(model, PruningPlan()), TwoStages(model, plan)
    sums = {index: found.kl for index, found in likelihoods(dense, served, lines)}
    calibration = prepare(*settings).calibration
    score = combine(settings.score.scoring(), calibration, sums, name="plan").value
    assert score == pytest.approx(result.score.value, rel=1e-5)
    again, solved = search(elsewhere(settings, tmp_path, resume=True, **changes))
    assert same(again) == same(result)
    assert compute.trained
    assert not solved.trained


@pytest.mark.parametrize("limit", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_killed_while_healing_and_resumed_ends_with_the_same_plan(
    tmp_path, settings, undisturbed, limit
):
    cut = elsewhere(settings, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        search(cut, limit)
    resumed, compute = search(cut.but(resume=True))
    assert same(resumed) == same(undisturbed[0])
    assert len(compute.trained) == len(undisturbed[1].trained) - limit
    again, compute = search(cut.but(resume=True))
    assert same(again) == same(resumed)
    assert not compute.trained
    assert (tmp_path / HEALED_FILE).read_bytes() == Path(settings.out, HEALED_FILE).read_bytes()


@pytest.mark.slow
def test_later_searches_reuse_what_is_whole(tmp_path, settings, undisturbed):
    first, second = (elsewhere(settings, tmp_path / name) for name in "ab")
    search(first)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "healed").rename(tmp_path / "b" / "healed")
    damaged, *_ = sorted((tmp_path / "b" / "healed").iterdir())
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    result, compute = search(second)
    assert same(result) == same(undisturbed[0])
    assert len(compute.trained) == 1
    others = elsewhere(second, tmp_path / "b", heal_steps=5)
    (tmp_path / "b" / "journal.jsonl").unlink()
    assert len(search(others)[1].trained) == len(undisturbed[1].trained)


@pytest.mark.slow
def test_only_the_distillation_set_is_healed(tmp_path, settings):
    """With ``pair``, blocks below the threshold are healed, whatever part of them is removed."""
    none = search(elsewhere(settings, tmp_path / "1", heal="pair", distillation_threshold=-1))
    assert not none[1].trained
    assert none[0].plan.healed is None
    assert not (tmp_path / "1" / HEALED_FILE).exists()
    every = search(elsewhere(settings, tmp_path / "2", heal="pair", distillation_threshold=1))
    assert every[1].trained
    journal = [json.loads(line) for line in (tmp_path / "1" / "journal.jsonl").open()]
    assert [line["kind"] for line in journal[:2]] == ["header", "influence"]
    assert journal[0]["settings"]["heal"] == "pair"
    assert journal[0]["heal_data"]


def test_a_front_writes_the_healed_tensors_of_every_plan(tmp_path, settings):
    front = elsewhere(settings, tmp_path, prefill_remove=0, decode_remove=2, pareto=True)
    result = prune_front(*front)
    assert any(any(point.candidate.decode) for point in result.points)
    for number, point in enumerate(result.points):
        plan = PruningPlan.load(tmp_path / "front" / f"{number:02d}")
        assert bool(plan.healed) == bool(point.candidate.decode)
        loaded = load_model(settings.score.model, plan=plan, stage="decode")
        assert loaded.parameter_bytes > 0
    assert (tmp_path / "healed").is_dir()
    assert not list((tmp_path / "sizes").glob("*/healed"))


def test_without_healing_nothing_of_it_is_written(tmp_path, settings):
    plain = elsewhere(settings, tmp_path, heal="none", heal_data=None, evaluations=4)
    prune(*plain)
    header = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])
    assert not [key for key in {**header, **header["settings"]} if "heal" in key]
    assert not list(tmp_path.glob("healed*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heal_data": None}, "heal=all with heal_data=None"),
        ({"heal": "none"}, "heal=none with heal_data="),
        ({"unit": "part"}, "only whole blocks are healed"),
        ({"pruning_set": True}, "need no healing"),
    ],
)
def test_contradictions_are_refused(tmp_path, settings, changes, message):
    with pytest.raises(InputError, match=message):
        prune(*elsewhere(settings, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_heal_data_must_not_be_scored_on(tmp_path, settings):
    heal = Path(settings.search.heal_data).read_text().splitlines()
    scored = Path(settings.score.calibration).read_text().splitlines()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*heal[:3], scored[4], *heal[3:]]))
    with pytest.raises(DataError, match=r"mixed.jsonl line 4: .*calibration.jsonl line 5"):
        prepare(*elsewhere(settings, tmp_path, heal_data=str(mixed)))
    mixed.write_text("\n".join(heal[:5]))
    with pytest.raises(DataError, match="holds 5 lines; give 8 or more"):
        prepare(*elsewhere(settings, tmp_path, heal_data=str(mixed)))


def test_a_plan_that_moved_without_its_tensors_says_so(tmp_path, settings, undisturbed):
    (tmp_path / "plan.json").write_text((settings.out / "plan.json").read_text())
    plan = PruningPlan.load(tmp_path)
    for stage in STAGES:
        with pytest.raises(PlanError, match=r"weights.safetensors: is missing"):
            load_model(settings.score.model, plan=plan, stage=stage)
