from __future__ import annotations

import math
import operator
import random
from dataclasses import replace

import pytest

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import Calibration, cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.search.racing import _going_on, _line_weights, chunk_order, race, rung_sizes
from rayapp.pruning.settings.objective import Objective


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("generation", [0, 3, 20])
def test_every_generation_orders_all_chunks_from_elsewhere(count, generation):
    order = chunk_order(count, generation)
    assert sorted(order) == list(range(count))
    assert order[0] == generation % count


def test_prefixes_spread_over_short_and_long_prompts():
    assert sorted(chunk_order(8, 0)[:4]) == [0, 2, 4, 6]
    assert sorted(chunk_order(16, 0)[:2]) == [0, 8]


def test_rungs_grow_to_all_chunks():
    assert rung_sizes(16, 8) == [2, 4, 8, 16]
    assert rung_sizes(3, 8) == [1, 2, 3]
    assert rung_sizes(1, 8) == [1]
    assert rung_sizes(16, 1) == [16]


class Counting(LocalCompute):
    """Counts the computed pieces by candidate."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(evaluator)
        self.chunks: dict[Candidate, set[int]] = {}

    def run(self, work):
        for piece in work:
            for candidate in piece.candidates:
                assert piece.chunk not in self.chunks.setdefault(candidate, set())
                self.chunks[candidate].add(piece.chunk)
        return super().run(work)


@pytest.fixture
def scorer(tiny_model, calibration: Calibration) -> Scorer:
    others = [replace(line, prompt=(7, *line.prompt)) for line in calibration.lines]
    chunked = cut([*calibration.lines, *others], chunk_tokens=40)
    assert len(chunked.chunks) >= 6
    evaluator = Evaluator(tiny_model("llama"), chunked, Objective())
    return Scorer(chunked, Objective(), Counting(evaluator), weights="w")


def generation(count: int = 8) -> list[Candidate]:
    rng = random.Random(1)
    return sorted({Space(5, 1, 2).draw(rng) for _ in range(4 * count)})[:count]


def test_the_best_is_scored_on_all_chunks_and_nobody_is_told_better(scorer):
    candidates = generation()
    told = race(scorer, candidates, generation=3)
    total = len(scorer.calibration.chunks)
    whole = [score for score in told if score.num_chunks == total]
    assert len(whole) == 1
    best = min(told, key=lambda score: score.value)
    assert best is whole[0]
    assert {s.num_chunks for s in told} <= set(rung_sizes(total, 8))
    assert sum(s.num_chunks == rung_sizes(total, 8)[0] for s in told) >= 4
    counts = {c: len(chunks) for c, chunks in scorer.compute.chunks.items()}
    assert [counts[c] for c in candidates] == [score.num_chunks for score in told]
    winner = candidates[told.index(best)]
    assert best.lines == scorer.score_many([winner])[0].lines


def test_estimates_keep_the_ratio_on_common_chunks(scorer):
    candidates = generation()
    told = race(scorer, candidates, generation=0)
    best = min(range(8), key=lambda i: told[i].value)
    order = chunk_order(len(scorer.calibration.chunks), 0)
    for candidate, score in zip(candidates, told, strict=True):
        mine, its = scorer.score_many([candidate, candidates[best]], order[: score.num_chunks])
        ratio = mine.value / its.value
        assert score.value == pytest.approx(told[best].value * max(1.0, ratio), rel=1e-9)


@pytest.mark.parametrize("first_token_weight", [1, 16])
@pytest.mark.parametrize("score_by", ["task", "token"])
def test_weights_add_lines_up_to_the_score(tiny_model, calibration, score_by, first_token_weight):
    chunked = cut(calibration.lines, chunk_tokens=40)
    objective = Objective(score_by=score_by, first_token_weight=first_token_weight)
    compute = LocalCompute(Evaluator(tiny_model("llama"), chunked, objective))
    scorer = Scorer(chunked, objective, compute, weights="w")
    for chunks in ([2], [0, 3, 1], range(len(chunked.chunks))):
        score = scorer.score_many(generation(1), chunks)[0]
        weights = _line_weights(scorer, chunks)
        assert math.fsum(map(operator.mul, weights, score.lines)) == pytest.approx(score.value)


def scores_of(rows: dict[Candidate, list[float]]) -> dict[Candidate, Score]:
    return {c: Score(math.fsum(row) / len(row), {}, tuple(row)) for c, row in rows.items()}


def test_who_clearly_lost_goes_no_further_and_who_may_win_does():
    lead, near, far, last, *_ = generation()
    scores = scores_of(
        {
            lead: [1.0, 2.0, 3.0, 4.0],
            near: [3.0, 1.0, 4.0, 3.0],  # behind by chance: the lines disagree
            far: [2.0, 3.1, 4.0, 5.0],  # behind on every line alike
            last: [9.0, 9.0, 9.0, 9.0],
        }
    )
    assert _going_on(scores, [0.25] * 4) == sorted([lead, near])
    del scores[near]
    assert _going_on(scores, [0.25] * 4) == [lead]


def test_at_most_half_go_on_and_one_line_proves_nothing():
    candidates = generation()
    alike = scores_of({c: [1.0, 1.0 + i % 2] for i, c in enumerate(candidates)})
    assert len(_going_on(alike, [0.5] * 2)) == 4
    single = scores_of({c: [1.0 + i] for i, c in enumerate(candidates)})
    assert _going_on(single, [1.0]) == candidates[:4]


def test_a_race_depends_on_nothing_but_its_candidates_and_number(scorer):
    candidates = generation()
    first = [score.value for score in race(scorer, candidates, 2)]
    again = [score.value for score in race(scorer, candidates[::-1], 2)][::-1]
    assert first == again
    assert race(scorer, [], 0) == []
    alone = race(scorer, candidates[:1], 5)[0]
    assert alone.num_chunks == len(scorer.calibration.chunks)


def test_progress_counts_work_in_whole_candidates(scorer):
    seen: list[float] = []
    told = race(scorer, generation(), 1, on_progress=seen.append)
    assert seen == sorted(seen)
    total = len(scorer.calibration.chunks)
    assert seen[-1] == pytest.approx(sum(score.num_chunks for score in told) / total)
