"""Which maps heal a candidate: one per span, and one per block that still writes KV."""

from __future__ import annotations

import itertools

import pytest

from rayapp.plan import STAGES
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.fits import Fit, all_fits, spans
from rayapp.pruning.candidates.healing import BRIDGED, BRIDGED_SERVED, PARTS, Healing

BLOCKS = 5
LINEAR = Healing(BLOCKS, linear=True)
EVERY = frozenset(range(BLOCKS))
BOTH = Healing(BLOCKS, EVERY, EVERY, linear=True)


def removing(prefill=(), decode=()):
    return Candidate(*(tuple(p for b in s for p in (2 * b, 2 * b + 1)) for s in (prefill, decode)))


def named(healing, *removed):
    return [str(unit) for unit in healing.units(removing(*removed))]


def test_spans_are_runs_of_skipped_blocks():
    assert list(spans([False, True, True, False, True])) == [(1, 3), (4, 5)]
    assert list(spans([True])) == [(0, 1)]
    assert not list(spans([False, False]))
    assert not list(spans([]))


def test_prefill_writes_the_kv_that_decode_reads_and_hands_a_state_on():
    assert named(LINEAR, [1, 2, 3], [2]) == [
        "prefill KV of 3 from 1",
        "prefill bridge 1 to 4",
        "decode bridge 2 to 3",
    ]
    assert named(LINEAR, [0, 1, 3]) == [
        "prefill KV of 1 from 0",
        "prefill bridge 0 to 2",
        "prefill bridge 3 to 4",
    ]


def test_a_block_of_which_a_part_runs_is_in_no_span():
    assert not LINEAR.units(Candidate((2,), (5,)))
    assert [str(u) for u in LINEAR.units(Candidate((), (2, 3, 4)))] == ["decode bridge 1 to 2"]


@pytest.mark.parametrize("first_token", STAGES)
def test_a_state_that_nothing_reads_is_not_bridged(first_token):
    healing = Healing(BLOCKS, linear=True, first_token=first_token)
    bridges = [u for u in healing.units(removing([3, 4], [4])) if u.kind == "bridge"]
    stages = ["decode", "prefill"] if first_token == "prefill" else ["decode"]
    assert sorted(u.stage for u in bridges) == stages


def test_survivors_take_the_spans_of_one_block():
    assert named(BOTH, [2], [2]) == ["decode 2 into 3", "prefill 2 into 3"]
    assert named(BOTH, [0, 2, 3], [2, 3]) == [
        "prefill 0 into 1",
        "prefill bridge 2 to 4",
        "decode bridge 2 to 4",
    ]
    assert named(BOTH, [], [0, 2, 4]) == [
        "decode 2 into 1",
        "decode 4 into 3",
        "decode bridge 0 to 1",  # no neighbour is free
    ]


def test_marks_tell_bridges_apart():
    candidate = removing([], [1, 2, 3])
    assert LINEAR.skips(candidate, "decode", BLOCKS) == (0, PARTS, PARTS, PARTS | BRIDGED, 0)
    served = Healing(BLOCKS, linear=True, served=True)
    later = removing([], [0, 2])
    assert served.skips(later, "decode", BLOCKS)[2] == PARTS | BRIDGED_SERVED
    assert LINEAR.skips(DENSE, "decode", BLOCKS) == (0,) * BLOCKS


def test_the_units_of_a_plan_replace_the_rule():
    fit = Fit("decode", "bridge", 1, 3, 2)
    fixed = Healing(fixed=(fit,))
    assert fixed.units(removing([], [1, 2])) == (fit,)
    assert fixed.skips(removing([], [1, 2]), "decode", 3)[2] == PARTS | BRIDGED


def test_every_fit_of_every_candidate_is_counted():
    every = {*all_fits(BLOCKS)}
    subsets = [s for n in range(BLOCKS + 1) for s in itertools.combinations(range(BLOCKS), n)]
    seen = {
        fit
        for healing in (LINEAR, BOTH)
        for removed in subsets
        for fit in healing.fits(removing(removed, removed[::2]))
    }
    assert seen <= every
    assert len(every) == len(list(all_fits(BLOCKS)))
