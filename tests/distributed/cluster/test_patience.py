"""A wait goes on where it can end, says what it waits for, and fails where nothing can end it."""

from __future__ import annotations

import pytest

from rayapp.distributed.cluster import patience
from rayapp.distributed.cluster.patience import Patience
from rayapp.errors import ClusterError


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


def test_what_is_slow_is_told_every_ten_seconds(clock, caplog):
    waiting = Patience()
    for _ in range(60):
        clock.now_s += 1
        waiting.go_on("node a has not answered")
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "waiting for 10 s: node a has not answered"
    assert len(told) == 6


def test_what_is_slow_ends_at_its_limit(clock):
    waiting = Patience(limit_s=300.0)
    clock.now_s += 299
    waiting.go_on("node a")
    clock.now_s += 1
    with pytest.raises(ClusterError, match=r"^gave up after 300 s: node a$"):
        waiting.go_on("node a")


def test_what_nothing_can_end_fails_within_thirty_seconds(clock):
    waiting = Patience()
    clock.now_s += 10
    waiting.go_on("an evaluator", never="no node has a GPU")
    clock.now_s += 10
    with pytest.raises(ClusterError, match=r"^no node has a GPU$"):
        waiting.go_on("an evaluator", never="no node has a GPU")


def test_hope_that_comes_back_starts_the_time_anew(clock):
    waiting = Patience()
    for never in ("none", None, "none"):
        clock.now_s += 15
        waiting.go_on("an evaluator", never=never)
    clock.now_s += 5
    with pytest.raises(ClusterError, match="none"):
        waiting.go_on("an evaluator", never="none")
