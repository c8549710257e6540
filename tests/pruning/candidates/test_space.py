from __future__ import annotations

import itertools
import random

import pytest

from rayapp.errors import InputError
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space

SPACES = [
    Space(4, 1, 2),
    Space(4, 2, 0),
    Space(4, 0, 3, kv_modes=False),
    Space(4, 1, 2, kv_modes=False),
    Space(4, 2, 2, kv_modes=False),
    Space(3, 1, 1.5, "part"),
    Space(3, 0.5, 1.5, "part", kv_modes=False),
    Space(4, 2, 2, shared=True),
    Space(3, 1.5, 1.5, "part", kv_modes=False, shared=True),
    Space(5, 1, 2, prefill_allowed=frozenset({0, 3}), decode_allowed=frozenset({0, 1, 4})),
    Space(5, 1, 2, "block", False, False, frozenset({0, 3, 4}), frozenset({0, 1, 4})),
    Space(4, 1, 1, shared=True, prefill_allowed=frozenset({1, 2, 3})),
    Space(3, 1, 1, "part", decode_allowed=frozenset({0, 2, 5})),
]


def by_force(space: Space) -> set[Candidate]:
    """All pairs of part sets that satisfy the sizes, the unit and the rule."""
    sets = [s for n in range(7) for s in itertools.combinations(range(2 * space.num_blocks), n)]
    if space.unit == "block":
        sets = [s for s in sets if {p ^ 1 for p in s} == set(s)]
    step = 2 if space.unit == "block" else 1

    def allowed(parts: tuple[int, ...], units: frozenset[int] | None) -> bool:
        return units is None or {part // step for part in parts} <= units

    return {
        Candidate(prefill, decode)
        for prefill, decode in itertools.product(sets, sets)
        if len(prefill) == 2 * space.prefill_remove
        and len(decode) == 2 * space.decode_remove
        and (space.kv_modes or set(prefill) <= set(decode))
        and (not space.shared or prefill == decode)
        and allowed(prefill, space.prefill_allowed)
        and allowed(decode, space.decode_allowed)
    }


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_enumeration_is_complete_and_ascending(space):
    listed = list(space)
    assert listed == sorted(by_force(space))
    assert len(listed) == space.size


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_draws_and_swaps_stay_inside_and_reach_everything(space):
    everything = set(space)
    rng = random.Random(0)
    assert {space.draw(rng) for _ in range(20 * len(everything))} == everything
    reached, edge = set(), [space.draw(rng)]
    while edge:
        candidate = edge.pop()
        if candidate not in reached:
            reached.add(candidate)
            edge += space.swaps(candidate)
    assert reached == everything


def test_membership():
    space = Space(4, 1, 1)
    assert Candidate((0, 1), (2, 3)) in space
    assert Candidate((0, 3), (2, 3)) not in space  # two halves of different blocks are no block
    assert Candidate((0, 1), ()) not in space
    assert Candidate((0, 1), (2, 3)) not in Space(4, 1, 1, kv_modes=False)
    assert "x" not in space


def test_swaps_of_one_stage_leave_the_other():
    space = Space(4, 1, 2, kv_modes=False)
    start = Candidate((2, 3), (2, 3, 4, 5))
    assert space.swaps(start, ("prefill",)) == [Candidate((4, 5), (2, 3, 4, 5))]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((4, 5, 0), "prefill_remove=5: the model has 4 blocks"),
        ((4, 0, 9), "decode_remove=9: the model has 4 blocks"),
        ((4, -1, 0), "prefill_remove=-1"),
        ((4, 0.5, 0), "whole blocks are removed"),
        ((4, 0.25, 0, "part"), "a part counts one half"),
        ((4, 2, 1, "block", False), "prefill removes only what decode removes"),
        ((4, 2, 1, "block", True, True), "one shared set is removed from both stages"),
        (
            (4, 2, 1, "block", True, False, frozenset({1})),
            "prefill_remove=2: only 1 blocks of prefill may be removed",
        ),
    ],
)
def test_contradictions_are_named(arguments, rule):
    with pytest.raises(InputError, match=rule):
        Space(*arguments)
