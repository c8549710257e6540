from __future__ import annotations

import io
import logging

from rich.console import Console

from rayapp.pruning.progress import ProgressReport, SearchProgress


def at(done: float, left: float) -> SearchProgress:
    return SearchProgress(done, 3, left, 10.0, "joint", "prefill[] decode[2]", 0.125, 2)


def test_a_moment_in_words():
    line = at(5, 10).line()
    assert at(5, 10).rate == 0.5
    assert at(5, 10).left_s == 20.0
    assert line == (
        "joint: 8 scored, at most 10 left, 0.50/s, 20 s left, 2 evaluators, "
        "best 0.125 prefill[] decode[2]"
    )
    assert "no plan yet" in SearchProgress(0, 0, 4, 0.0, "dense", None, None, 1).line()


def test_a_log_gets_plain_lines_at_most_so_often_and_the_last_one(caplog):
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO(), force_terminal=False)
    with ProgressReport(console, line_every_s=60) as report:
        for done in range(5):
            report(at(done, 4 - done))
    assert [r.message.split(",")[0] for r in caplog.records] == [
        "joint: 3 scored",
        "joint: 7 scored",
    ]
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar(caplog):
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with ProgressReport(console) as report:
        report(at(5, 10))
    assert "8 scored" in console.file.getvalue()
    assert not caplog.records
