"""Published tables and plain texts, read as they are."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayapp.data.json_lines import read_objects
from rayapp.data.lines import ChoiceLine, Line, parse_line
from rayapp.errors import DataError


def test_mmlu_without_a_header_is_a_question_a_row(tmp_path):
    path = tmp_path / "high_school_physics_test.csv"
    path.write_text('"What, if\nanything?",a,b,"c, d",e,C\nWhy?,1,2,3,4,A\n')
    (first, fields), (second, _) = read_objects(path)
    assert (first, second) == (2, 3)
    line = parse_line(fields, "here")
    assert isinstance(line, ChoiceLine)
    assert (line.choices, line.answer, line.task) == ([" A", " B", " C", " D"], 2, "MMLU")
    assert "about high school physics" in line.prompt
    assert "C. c, d\n" in line.prompt
    whole = parse_line(fields, "here", whole_answers=True)
    assert (whole.choices, whole.answer) == ([" a", " b", " c, d", " e"], 2)
    assert whole.prompt == "Question: What, if\nanything?\nAnswer:"


def test_a_table_with_names_is_read_by_them(tmp_path):
    path = tmp_path / "val.csv"
    path.write_text("id,question,A,B,C,D,answer\n0,why?,w,x,y,z,D\n")
    line = parse_line(read_objects(path)[0][1], "here")
    assert (line.task, line.answer) == ("C-Eval", 3)


def test_parquet_rows_are_lines(tmp_path):
    row = {"goal": "boil water", "sol1": "heat it", "sol2": "cool it", "label": 0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "piqa.parquet")
    ((number, fields),) = read_objects(tmp_path / "piqa.parquet")
    assert (number, parse_line(fields, "here").task) == (1, "PIQA")


def test_a_plain_text_is_named_after_its_file_or_directory(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    for path, task in (("novel.txt", "novel"), ("wikitext2/test.txt", "wikitext2")):
        (tmp_path / path).write_text("once upon\na time")
        assert read_objects(tmp_path / path) == [(1, {"text": "once upon\na time", "task": task})]


@pytest.mark.parametrize(
    ("fields", "prompt", "completion", "ends"),
    [
        (
            {"question": "2+2?", "answer": "It is 4.\n#### 4"},
            "Question: 2+2?\nAnswer:",
            " It is",
            True,
        ),
        ({"context": "I am ", "continuation": "here"}, "I am", " here", False),
        ({"instruction": "say", "context": "c", "response": "r"}, "c\n\nsay\n", "r", True),
    ],
)
def test_published_completions(fields, prompt, completion, ends):
    line = parse_line(fields, "here")
    assert isinstance(line, Line)
    assert (line.prompt, line.ends) == (prompt, ends)
    assert line.completion.startswith(completion)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "q,a,b,c,d,A\nq,a,b,c,d\n", "line 2: has 5 columns"),
        ("a.csv", "question,answer\nq,1,2\n", "line 2: has 3 columns"),
        ("a.csv", "question,answer\n", "no other"),
        ("a.csv", "\n", "no row"),
        ("a.txt", " \n", "is blank"),
        ("a.parquet", "nonsense", "cannot be read"),
    ],
)
def test_bad_tables_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_objects(tmp_path / name)


def test_a_missing_table_is_named(tmp_path):
    for name in ("a.csv", "a.txt", "a.parquet"):
        with pytest.raises(DataError, match=name):
            read_objects(tmp_path / name)
