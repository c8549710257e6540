from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from recorder.chart import Chart, Line
from recorder.dots import Dots, Marks, Panel
from recorder.files import write_text
from recorder.options import NamedPath, configuration_of, model_name
from recorder.origin import Start, measured_on
from recorder.record import read_record
from recorder.rows import Rows
from recorder.run import Recorder, render
from recorder.table import Table, interval

from rayapp.errors import InputError
from rayapp.evaluation.machine import this_machine
from rayapp.models.formats.origin import Origin
from rayapp.testbed import text_model_path

CHART = Chart("Lines", "x", "y", [Line("one", [1, 2], [3.0, 4.0])], level=("all", 5.0))


def report(record):
    rows = [(row["name"], str(row["value"])) for row in record["results"]]
    return ["Two rows.", Table(("name", "value"), rows), CHART]


@pytest.fixture
def arguments(tmp_path) -> Namespace:
    return Namespace(
        out=tmp_path / "results", name=None, render=None, threads=2, device="cpu",
        dtype="float32", model=text_model_path(), data=[Path("/somewhere/lines.jsonl")],
    )  # fmt: skip


@pytest.fixture
def recorder(arguments) -> Recorder:
    return Recorder("counting", arguments, "small", report)


def test_a_record_says_what_was_asked_and_where(recorder, arguments):
    recorder.write(results=[{"name": "a", "value": 1}])
    recorder.write(results=[{"name": "a", "value": 1}, {"name": "b", "value": 20}])
    file = arguments.out / "counting-small.json"
    record = read_record(file, "counting")
    assert record["configuration"] == {
        "threads": 2, "device": "cpu", "dtype": "float32", "model": "testbed-text",
        "data": ["lines.jsonl"],
    }  # fmt: skip
    assert record["machine"] == this_machine(device="cpu", num_threads=2).model_dump()
    assert record["machine"]["commit"] == recorder.commit
    assert record["date"].endswith("+00:00")
    assert record["results"][1] == {"name": "b", "value": 20}
    page = file.with_suffix(".md").read_text()
    assert page == (
        "Two rows.\n\n| name | value |\n| --- | ---: |\n| a | 1 |\n| b | 20 |\n\n"
        f"![Lines](counting-small.svg)\n\n{measured_on(record)}\n"
    )
    assert sorted(each.name for each in arguments.out.iterdir()) == [
        "counting-small.json", "counting-small.md", "counting-small.svg"
    ]  # fmt: skip


def test_a_page_is_made_again_from_its_record(recorder, arguments, tmp_path, capsys):
    recorder.write(results=[{"name": "a", "value": 1}])
    again = Namespace(render=[arguments.out / "counting-small.json"], out=tmp_path / "again")
    render(again, "counting", report)
    for name in ("counting-small.md", "counting-small.svg"):
        assert (again.out / name).read_bytes() == (arguments.out / name).read_bytes()
    assert capsys.readouterr().out == recorder.page
    with pytest.raises(InputError, match="lacks 'rows', which its page shows"):
        render(again, "counting", lambda record: record["rows"])
    with pytest.raises(InputError, match=r"is a record of counting.* run benchmarks/counting\.py"):
        read_record(again.render[0], "sorting")
    with pytest.raises(InputError, match="no record can be read"):
        read_record(arguments.out / "counting-small.md", "counting")


def test_a_part_is_replaced_and_the_others_stay(arguments):
    def parts(record):
        return [f"{name}: {part['result']}" for name, part in record["parts"].items()]

    recorder = Recorder("counting", arguments, "small", parts)
    recorder.write_part("one", result=1)
    recorder.write_part("two", result=2)
    first = read_record(arguments.out / "counting-small.json", "counting")["parts"]
    Recorder("counting", arguments, "small", parts).write_part("one", result=3)
    again = read_record(arguments.out / "counting-small.json", "counting")["parts"]
    assert again["two"] == first["two"]
    assert again["one"]["result"] == 3
    assert {"machine", "configuration", "date", "load_average"} <= set(again["one"])
    assert (arguments.out / "counting-small.md").read_text() == "one: 3\n\ntwo: 2\n"


def test_names_of_models_and_paths(tmp_path):
    assert model_name(text_model_path()) == "testbed-text"
    assert model_name(tmp_path / "mine") == "mine"
    given = Namespace(model=[tmp_path / "mine", text_model_path()], out=tmp_path, work=tmp_path)
    assert configuration_of(given) == {"model": ["mine", "testbed-text"]}
    data = [NamedPath.parse(text) for text in (f"ARC-e={tmp_path}/sets", f"{tmp_path}/sets")]
    assert [str(each) for each in data] == [f"ARC-e={tmp_path}/sets", f"{tmp_path}/sets"]
    assert configuration_of(Namespace(data=data)) == {"data": ["ARC-e=sets", "sets"]}


def test_what_a_page_says_of_the_machine():
    versions = {"torch": "2", "transformers": "5"}
    machine = {
        "processor": "P", "device": "G", "num_threads": 1, "versions": versions, "commit": "c"
    }  # fmt: skip
    origin = {"machine": machine, "cpu_s": 1234.4, "load_average": [0.5, 1], "date": "2030-01-02T"}
    assert measured_on(origin) == (
        "Measured on P, G, one thread, load average 0.5 to 1.0, 1,234 s of CPU, torch 2, "
        "transformers 5, 2030-01-02, commit c."
    )
    kept = origin | {"rows": {"a": [{"commit": "x"}, {"commit": "y-dirty"}]}}
    assert measured_on(kept) == (
        "Measured on P, G, one thread, torch 2, transformers 5, commits x, y-dirty."
    )


def test_a_models_caption_stands_in_record_and_page(tmp_path):
    origin = Origin(
        caption="Small, from Q4_1", source="small 1.0", source_sha256="0", license="MIT",
        weights_fingerprint="v2:0", files={},
    )  # fmt: skip
    origin.write(tmp_path)
    asked = Namespace(device="cpu", threads=1, model=[tmp_path, tmp_path / "none"])
    record = Start.now(asked).origin(asked)
    assert record["captions"] == ["Small, from Q4_1"]
    assert measured_on(record).startswith("Small, from Q4_1. Measured on ")
    asked.model = tmp_path / "none"
    assert "captions" not in Start.now(asked).origin(asked)


def test_tables_set_numbers_to_the_right():
    rows = [("a|b", "", "1.5x", "-"), ("c", "none", "out of reach", "-3"), ("d", "", "2", "+4")]
    assert Table(("name", "words", "ratio", "change"), rows).markdown() == (
        "| name | words | ratio | change |\n| --- | --- | ---: | ---: |\n"
        "| a\\|b |  | 1.5x | - |\n| c | none | out of reach | -3 |\n| d |  | 2 | +4 |"
    )
    assert interval(1.2345, (-1, 2), ".2f") == "1.23 (-1.00 to 2.00)"


def test_a_drawing_is_the_same_for_the_same_numbers():
    drawn = CHART.svg("salt")
    assert drawn == CHART.svg("salt")
    for words in ("one", "all", "x", "y"):
        assert f"<!-- {words} -->" in drawn


def test_rows_are_measured_once(tmp_path, capsys):
    rows = Rows(tmp_path, "c0ffee", told=("kl",))
    assert rows.kept("group", "b/1", lambda: {"kl": 0.25})["kl"] == 0.25
    rows.kept("group", "a row", dict)
    told = capsys.readouterr().out.splitlines()
    assert told == ["group: b/1, kl 0.25, 0 s", "group: a row, 0 s"]
    later = Rows(tmp_path, "decade")
    assert later.kept("group", "b/1", lambda: pytest.fail("measured twice"))["commit"] == "c0ffee"
    assert capsys.readouterr().out == ""
    assert list(later.all("group")) == ["b-1", "a_row"]  # as they were measured
    assert later.all("group")["a_row"]["name"] == "a row"
    assert later.all("other") == {}


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    file = write_text(tmp_path / "new" / "a.txt", "whole")
    assert file.read_text() == "whole"

    def broken(path, text, **_):
        path.write_bytes(text[:2].encode())
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="disk full"):
        write_text(file, "another")
    assert file.read_text() == "whole"
    monkeypatch.undo()
    assert json.loads(write_text(file, "[1]").read_text()) == [1]


def test_rows_of_marks_are_named_and_drawn_alike_every_time():
    rows = Panel("Rows", "KL", [Marks("m", [0.1, 1.0], ["a", "b"])], ("a", "b"), is_log=True)
    plane = Panel("Plane", "bytes", [Marks("m", [1, 2], [3, 40])], y="lost", y_ticks=(0, 10, 100))
    drawn = Dots("Both", [rows, plane]).svg("salt")
    assert drawn == Dots("Both", [rows, plane]).svg("salt")
    for words in ("Rows", "Plane", "KL", "a", "b", "m", "bytes", "lost", "10"):
        assert f"<!-- {words} -->" in drawn
