"""Completions that are cut off (``"ends": false``): no end marker is scored after them."""

from __future__ import annotations

import json

import pytest
import torch

from rayapp.data.lines import Line, TokenizedLine, parse_line, tokenize_line
from rayapp.engine.local import LocalPipeline
from rayapp.errors import DataError
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.measures.answers import judge_answers
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.tokenizer import load_tokenizer

SETTINGS = EvaluationSettings(num_runs=0, num_resamples=100)


@pytest.fixture(scope="module")
def home(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("cut-off"), "llama")


def test_a_line_says_whether_it_ends(home):
    tokenizer = load_tokenizer(home)
    for ends in (True, False):
        line = Line(prompt="abc", completion="de", ends=ends)
        tokens = tokenize_line(line, tokenizer, "here", 512)
        assert tokens.continuation == (100, 101, *[tokenizer.eos_token_id] * ends)
        assert tokens.ends == ends
    assert parse_line({"prompt": "a", "completion": "b"}, "here").ends


@pytest.mark.parametrize("ends", ['"no"', "0", "null"])
def test_what_is_neither_true_nor_false_is_refused(ends):
    fields = json.loads(f'{{"prompt": "a", "completion": "b", "ends": {ends}}}')
    with pytest.raises(DataError, match="here: `ends`"):
        parse_line(fields, "here")


def test_a_question_passes_it_on_to_a_search():
    fields = {"goal": "boil", "sol1": "heat", "sol2": "cool", "label": 1, "ends": False}
    assert parse_line(fields, "here").answered == Line(
        prompt="Question: boil\nAnswer:", completion=" cool", task="PIQA", ends=False
    )


def test_a_line_at_the_limit_fits_without_its_end_marker(home):
    tokenizer = load_tokenizer(home)
    whole = {"prompt": "a" * 10, "completion": "bc"}
    cut = tokenize_line(Line(**whole, ends=False), tokenizer, "f line 3", 12)
    assert len(cut.prompt) + len(cut.continuation) == 12
    with pytest.raises(DataError, match=r"f line 3: 10 prompt tokens .* = 13, .* context is 12"):
        tokenize_line(Line(**whole), tokenizer, "f line 3", 12)
    with pytest.raises(DataError, match=r"2 completion tokens = 13, "):
        tokenize_line(Line(prompt="a" * 11, completion="bc", ends=False), tokenizer, "f", 12)


def test_a_cut_off_answer_is_right_without_the_end(tiny_model):
    model = tiny_model("llama")
    prompt = (5, 9, 31, 7)
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)
    told = tuple(greedy[0, len(prompt) :].tolist())
    lines = [
        TokenizedLine(prompt, told, "", ends=False),
        TokenizedLine(prompt, told[:1], "", ends=False),
        TokenizedLine(prompt, (*told[:2], 256), ""),
        TokenizedLine(prompt, (told[0] + 1,), "", ends=False),
    ]
    judged = judge_answers(LocalPipeline(model), lines)
    assert [answer.is_match for answer in judged] == [True, True, told[2] == 256, False]
    assert [answer.begins for answer in judged] == [True, True, True, False]


def test_an_evaluation_scores_no_end_marker(home, tmp_path):
    rows = [{"prompt": "abcd" * 3, "completion": "efg"}, {"prompt": "xyz", "completion": "w"}]
    results = []
    for ends in (True, False):
        path = tmp_path / f"{ends}.jsonl"
        path.write_text("".join(json.dumps(row | {"ends": ends}) + "\n" for row in rows))
        results.append(evaluate(home, None, [path], settings=SETTINGS).tasks[0])
    whole, cut = results
    assert (whole.num_tokens, cut.num_tokens) == (6, 4)
    assert (whole.decode_share, cut.decode_share) == pytest.approx((4 / 6, 2 / 4))
    assert cut.dense_exact_match == cut.dense_answer == whole.dense_answer
