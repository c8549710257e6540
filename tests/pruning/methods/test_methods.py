"""Search methods on synthetic scores whose optimum is known by enumeration."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from rayapp.errors import InputError
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.gate_hessian import GateHessian
from rayapp.pruning.measures.influence import Influence
from rayapp.pruning.methods.evolution import (
    OFFSPRING,
    STARTS,
    Evolution,
    exchanged,
    num_generations,
)
from rayapp.pruning.methods.greedy import Greedy
from rayapp.pruning.methods.method import Generation, SearchMethod, Setup
from rayapp.pruning.methods.one_shot import OneShot
from rayapp.pruning.methods.quadratic import singles
from rayapp.pruning.methods.random_sets import Uniform
from rayapp.pruning.methods.similarity import most_redundant
from rayapp.pruning.methods.surrogate import MAX_VERIFIED, Surrogate
from rayapp.pruning.methods.table import METHODS
from rayapp.pruning.methods.window import Window, windows
from rayapp.pruning.preparation import open_evaluator, prepare
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.search.run import SearchResult, run_search
from rayapp.pruning.settings.search import Method
from tests.told import Told

BLOCKS = 8
INFLUENCE = Influence(*((0.5,) * count for count in (BLOCKS, 2 * BLOCKS) * 2))
RNG = np.random.default_rng(7)
CHANGES = RNG.normal(size=(2, 2 * BLOCKS, 24)) * RNG.uniform(0.05, 1, size=(2, 2 * BLOCKS, 1))
FLAT = CHANGES.reshape(-1, CHANGES.shape[-1])
GATE_HESSIAN = GateHessian(tuple(map(tuple, (FLAT @ FLAT.T).tolist())))
"""The Hessian of ``interacting``, up to a factor that changes no order."""
Scores = Callable[[Candidate], float]

SPACES = [
    Space(BLOCKS, 2, 2),
    Space(BLOCKS, 1, 3, kv_modes=False),
    Space(BLOCKS, 0, 3),
    Space(BLOCKS, 3, 0),
    Space(BLOCKS, 1, 0),
    Space(BLOCKS, 1, 0.5, "part"),
    Space(BLOCKS, 0.5, 1, "part", kv_modes=False),
    Space(BLOCKS, 0, BLOCKS),
    Space(BLOCKS, 2, 2, shared=True),
    Space(BLOCKS, 1, 2, kv_modes=False, prefill_allowed=frozenset({2, 3})),
    Space(BLOCKS, 1, 1, prefill_allowed=frozenset({2, 4, 7}), decode_allowed=frozenset({0, 1})),
]


def label(space: object) -> str:
    """Sizes and rules, for the names of tests."""
    if not isinstance(space, Space):
        return str(space)
    rules = [space.unit, *(["subset"] if not space.kv_modes else []), *(["shared"] * space.shared)]
    allowed = ["allowed"] if space.prefill_allowed else []
    return "-".join([f"{space.prefill_remove:g}+{space.decode_remove:g}", *rules, *allowed])


def additive(candidate: Candidate) -> float:
    """A score to which every part adds a cost of its own, and nothing more."""
    prefill = sum(((part * 7 + 3) % 11 + 1) ** 2 for part in candidate.prefill)
    return (prefill + sum(((part * 5 + 1) % 13 + 1) ** 2 for part in candidate.decode)) / 100


def interacting(candidate: Candidate) -> float:
    """A squared norm of summed changes, like the KL of small changes: parts help or hurt others."""
    total = CHANGES[0, list(candidate.prefill)].sum(axis=0)
    total = total + CHANGES[1, list(candidate.decode)].sum(axis=0)
    return float(1 - math.exp(-(total**2).sum() / 40))


def optimum(space: Space, score: Scores) -> float:
    return min(score(candidate) for candidate in space)


def make(name: str, space: Space, evaluations: int | None = None, seed: int = 0) -> SearchMethod:
    return METHODS[name](Setup(space, evaluations, 8, seed, INFLUENCE, GATE_HESSIAN))


def run(method: SearchMethod, score: Scores) -> list[Generation]:
    """Ask and tell to the end, and check that the method keeps the interface."""
    generations = []
    while (asked := method.ask()) is not None:
        before = method.evaluations_left
        assert 0 < len(asked.candidates) <= before
        assert list(asked.candidates) == sorted(set(asked.candidates))
        generations.append(asked)
        method.tell([score(candidate) for candidate in asked.candidates])
        assert method.evaluations_left <= before - len(asked.candidates)
    assert method.evaluations_left == 0
    assert method.ask() is None
    return generations


def best(generations: list[Generation], space: Space, score: Scores) -> float:
    asked = [c for generation in generations for c in generation.candidates]
    assert len(asked) == len(set(asked)), "scored twice"
    return min(score(candidate) for candidate in asked if candidate in space)


def test_settings_name_every_method():
    assert sorted(get_args(Method)) == sorted(METHODS)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"exhaustive"}))
@pytest.mark.parametrize("space", SPACES, ids=label)
@pytest.mark.parametrize("evaluations", [1, 2, 7, 23, None])
def test_budgets_hold_and_every_search_ends_with_a_candidate_of_the_space(name, space, evaluations):
    generations = run(make(name, space, evaluations), interacting)
    asked = sum(len(generation.candidates) for generation in generations)
    assert asked <= (evaluations or math.inf)
    assert best(generations, space, interacting) < math.inf


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"exhaustive"}))
def test_told_scores_replay_a_search_and_seeds_change_only_random_ones(name):
    space = Space(BLOCKS, 2, 2)
    first = run(make(name, space, 60), interacting)
    told = {c: interacting(c) for generation in first for c in generation.candidates}
    assert run(make(name, space, 60), told.__getitem__) == first
    is_random = name in ("annealing", "evolution", "random")
    assert (run(make(name, space, 60, seed=1), interacting) != first) == is_random


@pytest.mark.parametrize("space", SPACES, ids=label)
def test_one_shot_meets_the_optimum_where_effects_add_up(space):
    generations = run(make("one_shot", space), additive)
    assert best(generations, space, additive) == pytest.approx(optimum(space, additive))
    probes = len(singles(space))
    in_space = all(single in space for single in singles(space))
    assert sum(len(g.candidates) for g in generations) == probes + (not in_space)


@pytest.mark.parametrize("space", SPACES, ids=label)
@pytest.mark.parametrize(("score", "error"), [(additive, 0.0), (interacting, 0.02)])
def test_surrogate_meets_the_optimum_at_its_own_budget(space, score, error):
    generations = run(make("surrogate", space), score)
    assert best(generations, space, score) <= (1 + error) * optimum(space, score)


def test_surrogate_pays_a_fraction_of_the_space_where_one_shot_is_wrong():
    space = Space(BLOCKS, 2, 2)
    asked = run(make("surrogate", space, 60), interacting)
    assert best(asked, space, interacting) == optimum(space, interacting)
    one_shot = best(run(make("one_shot", space), interacting), space, interacting)
    assert one_shot > 1.01 * optimum(space, interacting)


def test_surrogate_scores_the_dense_model_and_singles_first_or_none_where_few_are_allowed():
    space = Space(BLOCKS, 2, 2)
    generations = run(make("surrogate", space, 25), interacting)
    first = [c for g in generations if g.phase == "singles" for c in g.candidates]
    assert first == [DENSE, *singles(space)]
    assert all(g.phase == "surrogate" for g in run(make("surrogate", space, 24), interacting))


def test_surrogate_takes_scores_that_fall_below_the_dense_ones():
    space = Space(BLOCKS, 0, 3)

    def shifted(candidate: Candidate) -> float:
        return 5.0 + additive(candidate) - 0.3 * len(candidate.decode)

    generations = run(make("surrogate", space), shifted)
    assert best(generations, space, shifted) == optimum(space, shifted)


def test_surrogate_asks_as_many_as_its_docstring_says():
    def asked(space: Space) -> int:
        return Surrogate(Setup(space, None, 8, 0)).evaluations_left

    assert asked(Space(12, 0, 2)) == 26 <= 0.4 * 66
    assert asked(Space(12, 0, 4)) == 72 <= 0.15 * 495
    assert asked(Space(12, 2, 2)) == 212 <= 0.05 * 4356
    assert asked(Space(32, 8, 8)) == 1 + 64 + MAX_VERIFIED


@pytest.mark.parametrize("space", SPACES, ids=label)
def test_cbo_verifies_the_best_of_its_model_first(space):
    generations = run(make("cbo", space, 11), interacting)
    asked = [c for generation in generations for c in generation.candidates]
    assert sorted(asked[:8]) == asked[:8]
    wanted = sorted(interacting(candidate) for candidate in space)[:11]
    assert sorted(map(interacting, asked)) == pytest.approx(wanted)
    assert sorted(map(interacting, asked[:8])) == pytest.approx(wanted[:8])


def test_cbo_does_not_learn_from_scores():
    space = Space(BLOCKS, 2, 2)
    assert run(make("cbo", space, 40), interacting) == run(make("cbo", space, 40), additive)


def test_random_exhausts_a_space_without_repeating():
    space = Space(BLOCKS, 1, 1)
    generations = run(Uniform(Setup(space, None, 8, 0)), additive)
    assert sorted(c for g in generations for c in g.candidates) == list(space)


def test_evolution_runs_the_papers_number_of_generations():
    assert num_generations(Space(32, 8, 0)) == 8 * 24 / 1.5
    assert num_generations(Space(BLOCKS, 3, 3)) == 2 * 3 * 5 / 1.5
    space = Space(BLOCKS, 3, 3)
    assert Evolution(Setup(space, None, 8, 0)).evaluations_left == STARTS + 20 * OFFSPRING


def test_evolution_mutates_the_best_by_at_most_three_exchanges():
    space = Space(BLOCKS, 3, 3)
    generations = run(Evolution(Setup(space, 200, 8, 0)), interacting)
    assert [len(g.candidates) for g in generations] == [64, 32, 32, 32, 32, 8]
    parent = min((interacting(c), c) for c in generations[0].candidates)
    for generation in generations[1:]:
        for child in generation.candidates:
            removed = {(s, u) for s, units in enumerate(space.units(child)) for u in units}
            kept = {(s, u) for s, units in enumerate(space.units(parent[1])) for u in units}
            assert 1 <= len(removed - kept) <= 3
        parent = min(parent, *((interacting(c), c) for c in generation.candidates))


def test_evolution_gets_better_than_its_random_start():
    space = Space(BLOCKS, 3, 3)
    generations = run(Evolution(Setup(space, 300, 8, 0)), interacting)
    start = min(interacting(c) for c in generations[0].candidates)
    assert best(generations, space, interacting) < start


def test_greedy_takes_the_best_next_unit_of_either_stage():
    space = Space(BLOCKS, 1, 2)
    generations = run(Greedy(Setup(space, None, 8, 0)), interacting)
    units = range(BLOCKS)
    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    for generation in generations:
        ways = [((*prefill, u), decode) for u in units if len(prefill) < 1]
        ways += [(prefill, (*decode, u)) for u in units if len(decode) < 2 and u not in decode]
        assert set(generation.candidates) == {space.candidate(*way) for way in ways}
        prefill, decode = min(ways, key=lambda way: interacting(space.candidate(*way)))
    assert (len(prefill), len(decode)) == (1, 2)
    assert len(generations) == 3


def test_greedy_keeps_the_subset_rule_at_every_step():
    space = Space(BLOCKS, 2, 3, kv_modes=False)
    for generation in run(Greedy(Setup(space, None, 8, 0)), interacting):
        assert all(set(c.prefill) <= set(c.decode) for c in generation.candidates)


def test_greedy_finishes_by_single_scores_where_evaluations_end():
    space = Space(BLOCKS, 0, 3)
    generations = run(Greedy(Setup(space, BLOCKS + 1, 8, 0)), additive)
    assert [len(g.candidates) for g in generations] == [BLOCKS, 1]
    assert generations[-1].candidates == (min(space, key=additive),)


def test_windows_are_contiguous_and_the_best_pair_is_verified():
    space = Space(BLOCKS, 2, 3)
    generations = run(Window(Setup(space, None, 8, 0)), interacting)
    pairs = {
        (p, d): interacting(space.candidate(p, ())) + interacting(space.candidate((), d))
        for p, d in itertools.product(windows(space, "prefill"), windows(space, "decode"))
    }
    favourite = min(pairs, key=lambda pair: (pairs[pair], space.candidate(*pair)))
    assert generations[-1].candidates == (space.candidate(*favourite),)
    assert sum(len(g.candidates) for g in generations) == 7 + 6 + 1
    assert windows(space, "decode")[-1] == (5, 6, 7)


def test_a_window_of_prefill_lies_in_decodes_without_kv_modes():
    space = Space(BLOCKS, 2, 3, kv_modes=False)
    [favourite] = run(Window(Setup(space, None, 8, 0)), interacting)[-1].candidates
    assert set(favourite.prefill) < set(favourite.decode)


def test_windows_that_no_rule_allows_are_refused():
    space = Space(4, 2, 2, kv_modes=False, prefill_allowed=frozenset({0, 3}))
    with pytest.raises(InputError, match="no contiguous window of prefill lies in one of decode"):
        Window(Setup(space, None, 8, 0))


def test_exchanges_reach_every_neighbour_and_nothing_else():
    for space in (Space(5, 1, 2, kv_modes=False), Space(5, 2, 1), Space(5, 2, 2, shared=True)):
        start = next(iter(space))
        rng = random.Random(0)
        assert {exchanged(space, start, rng) for _ in range(600)} == set(space.swaps(start))
    everything = next(iter(Space(3, 0, 3)))
    assert exchanged(Space(3, 0, 3), everything, rng) == everything


def test_the_most_redundant_candidate_is_in_the_space():
    rng = random.Random(1)
    for space in SPACES:
        influence = Influence(
            *(tuple(rng.random() for _ in range(n)) for n in (BLOCKS, 2 * BLOCKS) * 2)
        )
        assert most_redundant(space, influence) in space
        for _ in range(10):
            given = space.units(space.draw(rng))[1]
            assert most_redundant(space, influence, decode=given).decode == (
                space.candidate((), given).decode
            )


@pytest.fixture(scope="module")
def searched(tmp_path_factory, save_tiny, write_calibration):
    """Runs a search of one method in one directory."""
    directory = tmp_path_factory.mktemp("methods")
    model = str(save_tiny(directory, "llama"))
    lines = str(write_calibration(directory / "calibration.jsonl", count=3))
    evaluator: list[Evaluator] = []

    def search(name: str, out: Path, resume: bool) -> SearchResult:
        settings = Told.of(
            model=model, calibration=lines, out=str(out), method=name, resume=resume,
            prefill_remove=1, decode_remove=1, evaluations=None if name == "exhaustive" else 24,
        )  # fmt: skip
        prepared = prepare(*settings)
        evaluator[:] = evaluator or [
            open_evaluator(settings.score, settings.compute, prepared.calibration)
        ]
        compute = LocalCompute(evaluator[0])
        scorer = Scorer(prepared.calibration, settings.score.scoring(), compute, weights="w")
        return run_search(settings.score, settings.search, scorer, prepared.signature)

    return search


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_search_resumed_from_half_its_journal_ends_with_the_same_plan(name, searched, tmp_path):
    undisturbed = searched(name, tmp_path / "a", resume=False)
    lines = (tmp_path / "a" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "journal.jsonl").write_text("".join(lines[: 1 + len(lines) // 2]))
    resumed = searched(name, tmp_path / "b", resume=True)
    assert Candidate.from_plan(resumed.plan) == Candidate.from_plan(undisturbed.plan)
    asked = [trial.candidate for trial in undisturbed.trials]
    assert [trial.candidate for trial in resumed.trials] == asked
    best_told = min(
        (trial.score.value, trial.candidate)
        for trial in undisturbed.trials
        if trial.candidate in Space(5, 1, 1)
    )
    assert Candidate.from_plan(undisturbed.plan) == best_told[1]


def test_a_large_space_is_searched_within_its_budget():
    space = Space(32, 4, 4)
    weights = np.random.default_rng(3).random((2, 64)) ** 4

    def score(candidate: Candidate) -> float:
        decode, prefill = list(candidate.decode), list(candidate.prefill)
        return float((weights[0, prefill].sum() + weights[1, decode].sum()) ** 2)

    generations = run(Surrogate(Setup(space, 130, 16, 0)), score)
    ideal = sum(np.sort(w.reshape(32, 2).sum(axis=1))[:4].sum() for w in weights) ** 2
    assert best(generations, space, score) == pytest.approx(ideal)


def test_one_shot_counts_what_it_could_not_score_as_the_worst():
    space = Space(BLOCKS, 0, 2)
    generations = run(OneShot(Setup(space, 4, 8, 0)), additive)
    told = {c: additive(c) for c in generations[0].candidates}
    assert len(told) == 3
    two_best = sorted(told, key=lambda c: (told[c], c))[:2]
    expected = Candidate((), tuple(sorted(part for c in two_best for part in c.decode)))
    assert generations[1].candidates == (expected,)
