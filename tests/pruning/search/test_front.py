from __future__ import annotations

import itertools
import json
import random

import pytest

from rayapp.errors import InputError
from rayapp.plan import PruningPlan
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.preparation import open_evaluator, prepare
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.search.front import Point, search_front, undominated
from tests.told import Told


def dominates(one: Point, other: Point) -> bool:
    mine, its = (one.score, *one.price), (other.score, *other.price)
    return mine != its and all(a <= b for a, b in zip(mine, its, strict=True))


def test_the_front_is_what_nothing_dominates():
    rng = random.Random(0)
    points = [
        Point(Candidate((n,), ()), *(float(rng.randrange(4)) for _ in range(3)), rng.randrange(4))
        for n in range(80)
    ]
    front = undominated(points)
    free = [p for p in points if not any(dominates(other, p) for other in points)]
    assert {(p.score, *p.price) for p in front} == {(p.score, *p.price) for p in free}
    assert len(front) == len({(p.score, *p.price) for p in front})
    assert [p.score for p in front] == sorted(p.score for p in front)
    assert not any(dominates(a, b) for a, b in itertools.permutations(front, 2))


@pytest.fixture(scope="module")
def settings(tmp_path_factory, save_tiny, write_calibration) -> Told:
    directory = tmp_path_factory.mktemp("front")
    return Told.of(
        model=str(save_tiny(directory, "llama")),
        calibration=str(write_calibration(directory / "calibration.jsonl")),
        out=str(directory / "out"),
        prefill_remove=1,
        decode_remove=2,
        pareto=True,
        evaluations=40,
    )


def test_a_front_of_plans(settings, tmp_path):
    prepared = prepare(*settings)
    compute = LocalCompute(open_evaluator(settings.score, settings.compute, prepared.calibration))
    scorer = Scorer(prepared.calibration, settings.score.scoring(), compute, weights="w")
    wanted = settings.but(out=str(tmp_path)).search
    result = search_front(settings.score, wanted, scorer, prepared.signature)
    assert len(result.searches) == 2 * 3 - 1
    assert all(search.evaluations <= 40 // 5 + 1 for search in result.searches)
    rows = json.loads((tmp_path / "front.json").read_text())
    assert len(rows) == len(result.points) > 3
    assert result.points[0].candidate == DENSE
    for row, point in zip(rows, result.points, strict=True):
        plan = PruningPlan.load((tmp_path / row["plan"]).parent)
        assert Candidate.from_plan(plan) == point.candidate
        assert plan.provenance["score"] == row["score"] == point.score
    least = min(result.points, key=lambda point: point.bytes_sent)
    assert least.candidate.removed("decode") == 2
    resumed = wanted.model_copy(update={"resume": True})
    again = search_front(settings.score, resumed, scorer, prepared.signature)
    assert again.points == result.points
    with pytest.raises(InputError, match="go on with --resume"):
        search_front(settings.score, wanted, scorer, prepared.signature)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prefill_remove": 9}, "the model has 5 blocks"),
        ({"target_speedup": 1.5}, "leave out one or the other"),
        ({"prefill_remove": 0, "decode_remove": 0}, "leave no sizes to search"),
    ],
)
def test_contradictions_are_named(settings, changes, rule):
    with pytest.raises(InputError, match=rule):
        settings.but(**changes).search.check(5)


def test_sizes_honour_the_coupling(settings):
    assert settings.but(shared=True).search.sizes() == [(1, 1)]
    subset = settings.but(kv_modes=False).search.sizes()
    assert subset == [(0, 1), (0, 2), (1, 1), (1, 2)]
