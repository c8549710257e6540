"""Where marks, stairs and ticks stand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayapp.evaluation.report.axes import ZERO_SHARE, Scale
from rayapp.evaluation.report.plots import (
    block_plot,
    front_panels,
    loss_chart,
    removed_units,
    search_trace,
)
from rayapp.evaluation.report.search_record import FrontRow, TrialRow, single_removals
from rayapp.plan import PruningPlan

FOUND = (("1", "3"), ("3",))


def trial(score: float, removed=FOUND, chunks: int = 2) -> TrialRow:
    return TrialRow(*removed, score, chunks, "", False)


def test_the_trace_is_a_staircase_of_the_best_score(blocks_plan):
    trace = search_trace([trial(score) for score in (4.0, 6.0, 2.0, 3.0, 2.0)], blocks_plan)
    assert trace.best == ((0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0))
    compared, *others = trace.plot.series
    assert [(mark.x, mark.y) for mark in compared.marks] == [
        (0.0, 0.5), (0.25, 0.0), (0.5, 1.0), (0.75, 0.75), (1.0, 1.0)
    ]  # fmt: skip
    assert not any(series.marks for series in others)
    assert (trace.best_score, trace.num_compared, trace.plot.is_log) == (2.0, 5, False)


def test_estimates_and_other_sizes_do_not_compete(blocks_plan):
    rows = [
        trial(0.0, ((), ())),
        trial(0.001, (("2",), ())),
        trial(0.5, (("0", "2"), ("2",)), chunks=1),
        trial(8.0, (("0", "4"), ("4",))),
        trial(2.0),
    ]
    trace = search_trace(rows, blocks_plan)
    kinds = {series.name: len(series.marks) for series in trace.plot.series}
    assert kinds == {"compared": 2, "of another size": 2, "estimate": 1}
    assert (trace.num_candidates, trace.num_compared, trace.best_score) == (5, 2, 2.0)
    assert trace.plot.is_log
    assert trace.chosen.x == 1.0
    assert trace.chosen.title == "this plan: 2"
    assert trace.best[0][0] == 0.75  # the stairs begin with the first that competes


def test_traces_without_a_score(blocks_plan):
    assert search_trace([trial(math.inf), trial(math.nan)], blocks_plan) is None
    assert search_trace([], blocks_plan) is None
    only = search_trace([trial(1.0, ((), ()))], blocks_plan)
    assert (only.best, only.best_score, only.chosen) == ((), None, None)
    many = search_trace([trial(1.0)] * 10_000, blocks_plan)
    assert sum(len(series.marks) for series in many.plot.series) <= 1_000
    assert many.num_candidates == 10_000


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=8))
def test_every_value_has_a_place_on_every_axis(values):
    scale = Scale.of(values)
    assert all(0.0 <= scale.at(value) <= 1.0 for value in (*values, 0.0, -1.0, math.nan))
    assert all(0.0 <= share <= 1.0 and label for share, label in scale.ticks)


@given(st.lists(st.floats(min_value=1e-9, max_value=1e9), min_size=2, max_size=8), st.booleans())
def test_axes_keep_the_order(values, linear):
    scale = Scale.of(values, linear=linear)
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places)


def test_axes():
    assert Scale.of([1.0, 100.0, 0.0]).at(0.0) == 0.0
    assert Scale.of([1.0, 100.0, 0.0]).at(1.0) == ZERO_SHARE
    assert Scale.of([1.0, 100.0]).at(10.0) == pytest.approx(0.5)
    assert [label for _, label in Scale.of([0.001, 0.0, 2.0]).ticks] == [
        "0",
        "0.001",
        "0.01",
        "0.1",
        "1",
    ]
    assert [label for _, label in Scale.of([0.0, 4_100.0], linear=True).ticks][-1] == "4,000"
    assert not Scale.of([-1.0, 100.0]).is_log
    assert Scale.of([3.0]).at(3.0) == 0.5


def test_values_by_block_and_part():
    series = {"prefill": {"0.attention": 1.0, "0.mlp": 3.0}, "decode": {"1": 2.0, "0": math.nan}}
    plot = block_plot(series, 2, special=lambda *unit: unit == ("decode", "1"), lines={"at": 2.0})
    left, right = plot.series[0].marks
    assert left.x < right.x < 0.5
    assert (left.y, right.y) == (1.0, 0.0)
    (mark,) = plot.series[1].marks
    assert (mark.y, mark.is_special, mark.title) == (0.5, True, "decode, block 1: 2")
    assert plot.lines == ((0.5, "at: 2"),)
    assert [each.shape for each in plot.series] == ["circle", "square"]


def test_the_front_marks_the_plan(blocks_plan):
    rows = [
        FrontRow((), (), 0.0, 0.03, 0.004, 8_000),
        FrontRow(*FOUND, 0.5, 0.01, 0.003, 4_000),
        FrontRow(("1",), (), 0.1, 0.02, 0.004, 8_000),
    ]
    panels = front_panels(rows, blocks_plan)
    assert [panel.title for panel in panels] == ["prefill", "decode", "KV sent"]
    for panel in panels:
        counts = {series.name: len(series.marks) for series in panel.plot.series}
        assert counts == {"other plans": 1, "this plan": 1, "dense": 1}
    mine = panels[0].plot.series[1].marks[0]
    assert (mine.x, mine.y) == (0.0, 0.0)
    assert "10 ms per prompt" in mine.title
    assert front_panels([], blocks_plan) == ()


def test_points_lost_start_at_zero(evaluation):
    chart = loss_chart(evaluation)
    assert chart.zero_at == 0.0
    assert chart.rows[0].mean_at == pytest.approx(5 / 11.25)
    assert chart.rows[0].upper_at == 1.0
    assert chart.rows[-1].task == "mean over tasks"
    assert loss_chart(evaluation.model_copy(update={"tasks": (), "mean": None})) is None


def test_single_removals_are_on_all_chunks_and_unhealed():
    rows = [
        trial(1.0, (("4",), ())),
        trial(2.0, ((), ("2.mlp",))),
        trial(3.0, (("5",), ()), chunks=1),
        trial(4.0),
        TrialRow(("0",), (), 5.0, 2, "", True),
    ]
    assert single_removals(rows) == {"prefill": {"4": 1.0}, "decode": {"2.mlp": 2.0}}
    assert single_removals([]) == {}


def test_removed_units(plan):
    assert removed_units(plan, "prefill") == {
        "1", "1.attention", "1.mlp", "2.attention", "3", "3.attention", "3.mlp", "4.attention",
        "5.mlp",
    }  # fmt: skip
    assert removed_units(PruningPlan(), "decode") == frozenset()
