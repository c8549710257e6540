"""What is told of an evaluation before it is measured."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.forecast import forecast
from rayapp.evaluation.paper.count import few_lines, probed_rate
from rayapp.evaluation.pieces.piece import Done
from rayapp.evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(num_runs=0, max_num_seqs=1)
LINES = [
    *({"prompt": "ab" * n, "completion": "cd", "task": "copy"} for n in range(4, 24)),
    {"prompt": "9 * 2 = ", "completion": "18\n#### 18", "task": "sums"},
]


class Evaluators:
    """Evaluators that run a token in 1 ms where one of them runs alone, and in 2 ms together."""

    def __init__(self, count: int) -> None:
        self.num_evaluators, self.asked = count, []

    def open(self, _subject):
        return nullcontext(self)

    def use(self, _plan):
        pass

    def run(self, pieces):
        self.asked.append(len(pieces))
        for piece in pieces:
            tokens = sum(self._passed(piece.kind, line) for line in piece.examples)
            yield Done(piece, (), tokens * (1e-3 if len(pieces) == 1 else 2e-3))

    @staticmethod
    def _passed(kind, line):
        likelihood = 2 * (len(line.prompt) + len(line.continuation))
        return likelihood if kind == "likelihood" else len(line.prompt) + line.num_answer_tokens


@pytest.fixture(scope="module")
def checkpoint(save_tiny, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("forecast"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def told(checkpoint, data, count):
    place = Evaluators(count)
    return place, forecast(checkpoint, None, [data], settings=SETTINGS, place=place)


def test_evaluators_that_slow_each_other_down_promise_nothing(checkpoint, data):
    (_, alone), (place, two) = told(checkpoint, data, 1), told(checkpoint, data, 2)
    copy, sums = alone.rows
    assert copy.seconds == pytest.approx(copy.num_tokens * 1e-3)
    assert set(place.asked) == {2}, "all evaluators are probed at the same time"
    likelihood, answers = 2 * 600, (144, 272, 184)  # one batch, and three of 8, 8 and 4 lines
    assert copy.num_tokens == likelihood + 2 * sum(answers)
    shared = 2 * max(answers[0] + answers[2], answers[1])  # the free one takes the third
    assert two.rows[0].seconds == pytest.approx(2e-3 * (likelihood + shared))
    assert two.rows[1].seconds == pytest.approx(2 * sums.seconds), "no batch can be shared out"
    assert alone.seconds == pytest.approx(copy.seconds + sums.seconds)
    assert two.rows[0].num_tokens == copy.num_tokens


def test_tokens_are_those_of_all_passes_and_of_answers_judged_by_a_number(checkpoint, data):
    _, alone = told(checkpoint, data, 1)
    lengths = [2 * n + 3 for n in range(4, 24)]  # prompt, completion, end marker
    assert alone.rows[0].num_tokens == 4 * sum(lengths)
    prompt, completion = len("9 * 2 = "), len("18\n#### 18") + 1
    assert alone.rows[1].num_tokens == 2 * (prompt + completion) + 2 * (prompt + 256)


def test_the_rate_of_a_paper_is_that_of_all_evaluators_together():
    class Data:
        choices, texts, image_lines = {}, {}, ()

        def __init__(self, lines):
            self.completions = {"a": lines}

    class Line:
        prompt, continuation = (0,) * 7, (0,) * 3

    lines = few_lines([Data([Line()])])
    assert probed_rate(Evaluators(1), lines) == pytest.approx(1000)
    assert probed_rate(Evaluators(4), lines) == pytest.approx(2000), "four, each half as fast"


@pytest.mark.slow
def test_what_is_told_is_what_is_run(checkpoint, data):
    settings = SETTINGS.model_copy(update={"limit": 3})
    before = forecast(checkpoint, None, [data], settings=settings)
    assert before.seconds > 0
    assert "of answers flip" in before.sentence()
    result = evaluate(checkpoint, None, [data], settings=settings)
    assert [(row.task, row.num_examples) for row in before.rows] == [
        (row.task, row.num_examples) for row in result.tasks
    ]
