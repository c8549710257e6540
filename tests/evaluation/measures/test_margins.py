"""Which tasks count, and how much of the margin above chance is kept."""

from __future__ import annotations

import math
import random
import re

import pytest

from rayapp.evaluation.measures.likelihood import LineLikelihood
from rayapp.evaluation.measures.margins import Answers, quality_of
from rayapp.evaluation.measures.perplexity import ScoredWindows, Windows
from rayapp.evaluation.measures.prompt_bytes import PromptBytes
from rayapp.evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(num_resamples=500)


def answers(dense: float, plan: float, *, count: int = 400, choices: int = 4, **changes) -> Answers:
    """A task on which both sides are right so often, the plan never where dense is wrong."""
    right = int(dense * count), int(plan * count)
    keys = [n % choices for n in range(count)]
    random.Random(0).shuffle(keys)
    fields = {
        "metric": "acc",
        "dense": [n < right[0] for n in range(count)],
        "plan": [n < right[1] for n in range(count)],
        "chance": [1 / choices] * count,
        "keys": (keys,),
        "decode_share": 0.8,
    }
    return Answers(**(fields | changes))


def windows(lost: float, count: int = 8) -> ScoredWindows:
    rng = random.Random(1)
    sums = []
    for _ in range(count):
        dense = 100 * rng.uniform(2, 4)
        sums.append(LineLikelihood(dense, dense + 100 * lost, 1.0, 100, False, False))
    return ScoredWindows(Windows((), 200, 100, 100, 0), sums, PromptBytes(1, 1, 0))


def test_the_kept_share_of_the_margin():
    quality = quality_of({"a": answers(0.65, 0.45)}, {}, {}, SETTINGS)
    (row,) = quality.margins
    assert row.admitted
    assert row.margin_kept.mean == pytest.approx((0.45 - 0.25) / (0.65 - 0.25))
    assert row.margin_kept.lower < row.margin_kept.at_least < row.margin_kept.mean
    assert row.margin_kept.mean < row.margin_kept.upper < 1
    assert (row.chance, row.majority) == (0.25, 0.25)
    assert quality.macro == row.margin_kept


def test_an_equal_plan_keeps_all_of_it_for_certain():
    (row,) = quality_of({"a": answers(0.6, 0.6)}, {}, {}, SETTINGS).margins
    assert (row.margin_kept.lower, row.margin_kept.mean, row.margin_kept.upper) == (1, 1, 1)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (answers(0.27, 0.27), r"no better than chance, 25.0% and the commonest answer, 25.0%"),
        (
            answers(0.6, 0.5, keys=([0] * 260 + [1] * 140,)),
            "no better than the commonest answer, 65",
        ),
        (answers(0.9, 0.9, decode_share=0.0), "decode computed none"),
    ],
)
def test_tasks_that_do_not_count_say_why(task, reason):
    quality = quality_of({"bad": task, "good": answers(0.6, 0.5)}, {}, {}, SETTINGS)
    refused, counted = quality.margins
    assert not refused.admitted
    assert refused.margin_kept is None
    assert re.search(reason, refused.reason), refused.reason
    assert quality.counted == (counted,)
    assert quality.macro.num_examples == counted.num_examples


@pytest.mark.parametrize(("share", "counts"), [(0.28, False), (0.5, True), (1.0, True)])
def test_a_plan_of_decode_alone_is_judged_by_what_decode_computed(share, counts):
    tasks = {"last word": answers(0.6, 0.6, decode_share=share), "cloze": answers(0.6, 0.5)}
    word, cloze = quality_of(tasks, {}, {}, SETTINGS, only_decode=True).margins
    assert word.admitted == counts
    told = "28% of its scored tokens, and the plan changes decode alone" in word.reason
    assert told == (not counts)
    assert cloze.admitted
    both = quality_of(tasks, {}, {}, SETTINGS)
    assert all(row.admitted for row in both.margins), "prefill decides the first token"


def test_a_seen_task_is_shown_and_not_counted():
    tasks = {"seen": answers(0.6, 0.1), "new": answers(0.6, 0.5)}
    quality = quality_of(tasks, {}, {"seen": "the plan knows it"}, SETTINGS)
    seen, new = quality.margins
    assert seen.admitted
    assert seen.reason == seen.seen == "the plan knows it"
    assert seen.margin_kept is not None
    assert quality.macro.mean == new.margin_kept.mean
    assert quality.worst == "new"


def test_the_mean_counts_tasks_alike_and_names_the_worst():
    tasks = {"large": answers(0.65, 0.65, count=800), "small": answers(0.65, 0.45, count=100)}
    quality = quality_of(tasks, {}, {}, SETTINGS)
    assert quality.macro.mean == pytest.approx(0.75)
    assert quality.worst == "small"


def test_more_compared_plans_widen_the_intervals():
    tasks = {"a": answers(0.65, 0.45)}
    one = quality_of(tasks, {}, {}, SETTINGS).macro
    six = quality_of(tasks, {}, {}, SETTINGS.model_copy(update={"num_compared": 6})).macro
    assert six.mean == one.mean
    assert six.lower < one.lower
    assert six.at_least < one.at_least


def test_perplexity_is_a_ratio_and_seen_text_stands_apart():
    texts = {"wiki": windows(0.2), "news": windows(0.1), "web": windows(0.3)}
    quality = quality_of({}, texts, {"wiki": "the plan knows it"}, SETTINGS)
    assert [row.seen for row in quality.texts] == ["the plan knows it", "", ""]
    for row, lost in zip(quality.texts, (0.2, 0.1, 0.3), strict=True):
        assert row.ratio.mean == pytest.approx(math.exp(lost)) == row.plan / row.dense
    assert quality.perplexity_ratio.mean == pytest.approx(math.exp(0.2))  # of news and web
    assert quality.macro is None
