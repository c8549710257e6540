"""Spans: which rows are read together."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.engine.attention.spans import RowPlace, spans_of


def even(highs, *, run=100, start=0, step=300):
    return [RowPlace(start + i * step, run, 0, high) for i, high in enumerate(highs)]


def test_rows_that_lie_evenly_are_read_at_once():
    (span,) = spans_of(even([10, 10, 10, 10]), call_entries=0)
    assert (span.first, span.stop, span.low, span.high) == (0, 4, 0, 10)
    assert [span.offset(0), span.stride(0), span.offset(2)] == [0, 300, 200]


def test_a_long_row_does_not_make_the_others_long():
    spans = spans_of(even([10, 10, 90, 10, 10]), call_entries=5)
    assert [(span.first, span.stop, span.high) for span in spans] == [
        (0, 2, 10),
        (2, 3, 90),
        (3, 5, 10),
    ]
    assert len(spans_of(even([10, 10, 90, 10, 10]), call_entries=1000)) == 1


def test_rows_that_lie_unevenly_are_read_apart():
    rows = [*even([10, 10]), *even([10, 10], start=1000)]
    assert [(span.first, span.stop) for span in spans_of(rows, 50)] == [(0, 2), (2, 4)]


def test_a_view_never_leaves_a_row_s_run():
    rows = [RowPlace(0, 16, 0, 16), RowPlace(300, 32, 0, 20)]
    assert len(spans_of(rows, 1000)) == 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_entry_of_a_row_is_in_its_view(data):
    rows, start = [], 0
    for _ in range(data.draw(st.integers(1, 12))):
        run = data.draw(st.sampled_from([16, 32, 48]))
        high = data.draw(st.integers(1, run))
        low = data.draw(st.integers(0, high - 1))
        start += data.draw(st.sampled_from([0, 0, 16]))
        rows.append(RowPlace(start, run, low, high))
        start += 3 * run
    spans = spans_of(rows, data.draw(st.integers(0, 40)))
    assert [row for span in spans for row in range(span.first, span.stop)] == list(range(len(rows)))
    for span in spans:
        for row in range(span.first, span.stop):
            place = rows[row]
            assert span.low <= place.low
            assert place.high <= span.high <= place.run
            for run in range(3):
                begin = span.offset(run) + (row - span.first) * span.stride(run)
                assert begin - span.low == place.start + run * place.run
