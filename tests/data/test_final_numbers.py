"""Worked answers are told by their final numbers, as published solutions write them."""

from __future__ import annotations

import pytest

from rayapp.data.final_numbers import ANSWER_TOKENS, final_number, marked_number
from rayapp.data.lines import Line, tokenize_line


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        (" She sells 9.\nShe makes $<<9*2=18>>18.\n#### 18", "18"),
        ("It is much.\n#### $1,250.50", "1250.5"),
        ("It falls.\n#### -3 \n", "-3"),
        ("####7", None),
        ("It is 18.", None),
        ("#### 18\nThat is all.", None),
    ],
)
def test_a_completion_is_worked_if_its_last_line_is_marked(completion, number):
    assert marked_number(completion) == number


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 2 + 16 = 18\n#### 18", "18"),
        ("#### 18\n\nTake 5 more.\n#### 23", "18"),
        ("She makes $18.00 every day.", "18"),
        ("That are 1,000 eggs.", "1000"),
        ("9 * 2 = 18\nQuestion: How many are 7 and 8?\nAnswer: 15", "18"),
        ("he owes -0.50", "-0.5"),
        ("half of it, .5", "0.5"),
        ("0.00", "0"),
        ("12 of them\n#### none", "12"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_final_number_of_an_answer(answer, number):
    assert final_number(answer) == number


def test_a_worked_line_leaves_room_for_other_ways_to_the_number(byte_tokenizer):
    line = Line(prompt="Question: 9 * 2?\nAnswer:", completion=" It is 18.\n#### 18")
    told = tokenize_line(line, byte_tokenizer, "here", 1000)
    assert (told.number, told.num_answer_tokens) == ("18", ANSWER_TOKENS)
    short = tokenize_line(line, byte_tokenizer, "here", 100)
    assert short.num_answer_tokens == 100 - len(line.prompt), "no more than the context holds"
    plain = tokenize_line(Line(prompt="9 * 2?", completion=" 18"), byte_tokenizer, "here", 1000)
    assert (plain.number, plain.num_answer_tokens) == ("", len(plain.continuation))
