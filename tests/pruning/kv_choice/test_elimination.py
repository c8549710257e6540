"""The search against brute force over all sets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from rayapp.plan import KVTransfer
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.calibration import cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.kv_choice.bytes import KVBytes
from rayapp.pruning.kv_choice.cuts import first_and_last
from rayapp.pruning.kv_choice.elimination import NUM_HALVINGS, Elimination, Goal
from rayapp.pruning.kv_choice.levels import KVLevels, KVSet
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective

NUM_LEVELS = (4, 3, 4, 4, 3)


def some_levels() -> KVLevels:
    """Levels without a model, of which only the number matters here."""
    rules = [*(KVTransfer(first=1, last=2**n) for n in range(3)), KVTransfer()]
    return KVLevels(tuple(range(5)), tuple(tuple(rules[-count:]) for count in NUM_LEVELS))


def num_bytes(chosen: KVSet) -> int:
    return 100 + sum((17 + 3 * index) * 2**level for index, level in enumerate(chosen))


class Landscape:
    """Random effects of every level, and of every pair of blocks: they do not add up."""

    def __init__(self, seed: int, interaction: float) -> None:
        rng = random.Random(seed)
        self.asked: list[KVSet] = []
        steps = [sorted(rng.random() ** 3 for _ in range(count - 1)) for count in NUM_LEVELS]
        self._single = [[sum(s[level:]) for level in range(len(s) + 1)] for s in steps]
        self._pair = {
            pair: interaction * rng.uniform(-1, 1)
            for pair in itertools.combinations(range(len(NUM_LEVELS)), 2)
        }

    def value(self, chosen: KVSet) -> float:
        lost = [single[level] for single, level in zip(self._single, chosen, strict=True)]
        return sum(lost) + sum(w * lost[a] * lost[b] for (a, b), w in self._pair.items())

    def score(self, sets: Sequence[KVSet], phase: str) -> list[float]:
        self.asked += sets
        return [self.value(each) for each in sets]


ALL_SETS = list(itertools.product(*map(range, NUM_LEVELS)))


def optimum(landscape: Landscape, goal: Goal) -> KVSet:
    return min(ALL_SETS, key=lambda each: goal.key(landscape.value(each), num_bytes(each)))


@pytest.mark.parametrize("interaction", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["bytes", "score"])
def test_found_sets_are_near_the_best_of_all(kind, interaction):
    """On 40 landscapes the set is nearly always the optimum, and never far from it, at a part of
    the cost.
    """
    met, asked = 0, 0
    for seed in range(40):
        landscape, rng = Landscape(seed, interaction), random.Random(-seed)
        scores = sorted(map(landscape.value, ALL_SETS))
        sizes = sorted(map(num_bytes, ALL_SETS))
        share = rng.uniform(0.1, 0.9)
        goal = (
            Goal(max_bytes=sizes[int(share * len(sizes))])
            if kind == "bytes"
            else Goal(max_score=scores[int(share * len(scores) / 2)])
        )
        search = Elimination(some_levels(), goal, landscape.score, num_bytes, seed=seed)
        found, best = search.run(), optimum(landscape, goal)
        asked += len(landscape.asked)
        assert len(landscape.asked) == len(set(landscape.asked))
        missed, value, _ = goal.key(landscape.value(found), num_bytes(found))
        assert missed == 0
        wanted = goal.key(landscape.value(best), num_bytes(best))[1]
        met += value == wanted
        assert value <= 1.3 * wanted, seed
        assert search.steps[0].chosen == some_levels().smallest
        assert search.steps[-1].chosen == found
    assert met >= (36 if interaction else 40)
    assert asked / 40 < len(ALL_SETS) / 10


@pytest.mark.parametrize("kind", ["bytes", "score"])
@pytest.mark.parametrize("max_sets", [7 + NUM_HALVINGS, 30, 90])
def test_a_bound_on_sets_is_kept_and_the_goal_is_met(kind, max_sets):
    """A bounded search meets its goal on every landscape, and more sets are never a worse choice
    on average.
    """
    values = []
    for seed in range(20):
        landscape, sizes = Landscape(seed, 0.3), sorted(map(num_bytes, ALL_SETS))
        middle = sorted(map(landscape.value, ALL_SETS))[len(ALL_SETS) // 4]
        goal = Goal(max_bytes=sizes[len(sizes) // 2]) if kind == "bytes" else Goal(max_score=middle)
        levels = some_levels()
        search = Elimination(levels, goal, landscape.score, num_bytes, max_sets=max_sets)
        found = search.run()
        missed, value, _ = goal.key(landscape.value(found), num_bytes(found))
        assert len(landscape.asked) <= max_sets
        assert missed == 0
        best = optimum(landscape, goal)
        values.append(value / goal.key(landscape.value(best), num_bytes(best))[1])
    assert sum(values) / len(values) < {17: 1.25, 30: 1.12, 90: 1.01}[max_sets]


def test_the_same_seed_asks_for_the_same_sets():
    asked = []
    for _ in range(2):
        landscape = Landscape(3, 0.5)
        Elimination(some_levels(), Goal(max_bytes=700), landscape.score, num_bytes, seed=1).run()
        asked.append(landscape.asked)
    assert asked[0] == asked[1]


def test_a_score_that_no_set_reaches_gives_the_nearest():
    landscape = Landscape(0, 0.0)
    goal = Goal(max_score=-1.0)
    found = Elimination(some_levels(), goal, landscape.score, num_bytes).run()
    assert found == some_levels().full


@pytest.mark.parametrize("first_token", [pytest.param("prefill", marks=pytest.mark.slow), "decode"])
def test_brute_force_on_a_model(tiny_model, calibration, first_token):
    """Three blocks where decode attends, two cuts and all, two encodings: 216 sets."""
    model = tiny_model("llama")
    lines = cut([line for line in calibration.lines if len(line.prompt) > 5])
    objective = Objective(first_token=first_token)
    scorer = Scorer(lines, objective, LocalCompute(Evaluator(model, lines, objective)), weights="w")
    base = Candidate((), (2, 3, 6))
    signature = scorer.compute._evaluator.runner.signature  # type: ignore[attr-defined]
    plan = base.plan(signature, first_token=first_token)
    weighed = KVBytes(model.config, plan, [len(line.prompt) for line in lines.lines])
    blocks = [b for b in range(5) if plan.mode("decode", b).attends]
    levels = KVLevels.of(blocks, weighed, cuts=first_and_last(1, (1, 0.5)), smallest="int8")
    assert levels.size == 216
    sets = list(itertools.product(*(range(len(each)) for each in levels.levels)))
    values = [s.value for s in scorer.score_many([base.with_kv(levels.rules(s)) for s in sets])]
    table = dict(zip(sets, values, strict=True))
    asked: set[KVSet] = set()

    def score(some: Sequence[KVSet], phase: str) -> list[float]:
        asked.update(some)
        return [table[each] for each in some]

    def sent(chosen: KVSet) -> int:
        return weighed.sent(levels.rules(chosen))

    least, most = sent(levels.smallest), sent(levels.full)
    for share in (0.2, 0.4, 0.6, 0.8):
        goal = Goal(max_bytes=int(least + share * (most - least)))
        best = min(sets, key=lambda each: goal.key(table[each], sent(each)))
        asked.clear()
        found = Elimination(levels, goal, score, sent).run()
        assert table[found] <= 1.05 * table[best]
        assert sent(found) <= goal.max_bytes
        assert len(asked) < 108
