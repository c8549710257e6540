"""The scheduler: plain logic over names and numbers of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.engine.scheduler import Chunk, Scheduler, Step
from rayapp.errors import IntegrityError


def steps(scheduler: Scheduler, count: int) -> list[list[tuple[str, int]]]:
    return [[(c.name, c.num_tokens) for c in scheduler.next_step().chunks] for _ in range(count)]


def test_a_short_prompt_passes_a_long_one_that_has_begun():
    scheduler = Scheduler(10)
    scheduler.add("long", 35)
    assert scheduler.next_step().chunks == (Chunk("long", 10, is_first=True, is_last=False),)
    scheduler.add("short", 4)
    assert (scheduler.num_waiting, scheduler.num_begun, scheduler.num_tokens) == (1, 1, 29)
    assert scheduler.next_step().chunks == (
        Chunk("short", 4, is_first=True, is_last=True),
        Chunk("long", 6, is_first=False, is_last=False),
    )
    assert steps(scheduler, 3) == [[("long", 10)], [("long", 9)], []]
    assert len(scheduler) == scheduler.num_tokens == 0


def test_prompts_share_a_step_and_equal_ones_keep_their_order():
    scheduler = Scheduler(10)
    for name in ("first", "second", "third"):
        scheduler.add(name, 4)
    assert steps(scheduler, 2) == [[("first", 4), ("second", 4), ("third", 2)], [("third", 2)]]


def test_a_long_prompt_does_not_starve_behind_short_ones():
    """A prompt of N tokens waits for at most 4 N tokens of others that came later."""
    scheduler = Scheduler(10)
    scheduler.add("long", 40)
    num_others, done = 0, 0
    for number in range(100):
        scheduler.add(f"short-{number}", 10)
        for chunk in scheduler.next_step().chunks:
            if chunk.name == "long":
                done += chunk.num_tokens
            else:
                num_others += chunk.num_tokens
        if done == 40:
            break
    assert done == 40
    assert num_others <= 4 * 40


def test_a_prompt_can_leave_at_any_time():
    scheduler = Scheduler(10)
    scheduler.add("a", 15)
    scheduler.add("b", 16)
    scheduler.next_step()
    assert scheduler.remove("a")
    assert not scheduler.remove("a")
    assert steps(scheduler, 3) == [[("b", 10)], [("b", 6)], []]
    scheduler.add("a", 1)
    with pytest.raises(IntegrityError, match="'a'"):
        scheduler.add("a", 1)
    with pytest.raises(IntegrityError, match="0 tokens"):
        scheduler.add("nothing", 0)


def test_running_sequences_come_first_and_prompts_get_the_rest():
    scheduler = Scheduler(10)
    assert not scheduler.next_step()
    assert scheduler.next_step(3) == Step(3, ())
    scheduler.add("a", 16)
    assert scheduler.next_step(3) == Step(3, (Chunk("a", 7, is_first=True, is_last=False),))
    assert scheduler.next_step(50) == Step(50, (Chunk("a", 1, is_first=False, is_last=False),))
    assert scheduler.next_step() == Step(0, (Chunk("a", 8, is_first=False, is_last=True),))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12),
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 3), st.booleans(), st.integers(0, 14)),
        max_size=25,
    ),
)
def test_every_token_is_scheduled_once_and_no_step_is_too_large(budget, arrivals):
    """Prompts arrive between steps, some leave again; all others are computed whole.

    However many sequences run, every step computes a token of each and some prompt's next tokens.
    """
    scheduler, left, computed = Scheduler(budget), set(), {}

    def step(num_running=0):
        waiting = scheduler.num_tokens
        made = scheduler.next_step(num_running)
        assert made.num_running == num_running
        assert sum(c.num_tokens for c in made.chunks) == min(waiting, max(1, budget - num_running))
        for c in made.chunks:
            assert c.is_first == (c.name not in computed)
            computed[c.name] = computed.get(c.name, 0) + c.num_tokens
            assert c.is_last == (computed[c.name] == sizes[c.name])
        return made

    sizes = {}
    for number, (size, num_steps, leaves, num_running) in enumerate(arrivals):
        name = str(number)
        sizes[name] = size
        scheduler.add(name, size)
        for _ in range(num_steps):
            step(num_running)
        if leaves and scheduler.remove(name):
            left.add(name)
    while step():
        pass
    assert len(scheduler) == 0
    assert {n: c for n, c in computed.items() if n not in left} == {
        n: s for n, s in sizes.items() if n not in left
    }


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12),
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 14)), min_size=1, max_size=60),
)
def test_no_prompt_starves(budget, arrivals):
    """A prompt of N tokens waits for at most 4 N tokens of prompts that came after it."""
    scheduler, sizes, later = Scheduler(budget), {}, {}
    for number, (size, num_running) in enumerate(arrivals):
        name = str(number)
        sizes[name], later[name] = size, 0
        scheduler.add(name, size)
        for chunk in scheduler.next_step(num_running).chunks:
            for other in [o for o in later if int(o) < int(chunk.name)]:
                later[other] += chunk.num_tokens
            if chunk.is_last:
                # What shares a step with its last chunk came in the same step, not before it.
                assert later.pop(chunk.name) <= 4 * sizes[chunk.name] + budget
