"""What is held for a process that has died ends at once; what others hold stays."""

from __future__ import annotations

import asyncio

import pytest

from rayapp.distributed.serve import callers as watched
from rayapp.distributed.serve.callers import Callers


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(watched, "PERIOD_S", 0.005)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 10))


async def settled(callers):
    while callers._watching is not None:
        await asyncio.sleep(0.005)


def test_what_a_dead_caller_holds_ends_and_the_rest_stays():
    async def scenario():
        dead, ended = {"gone"}, []
        callers = Callers(lambda name: name not in dead)
        releases = [
            callers.hold(actor, lambda actor=actor: ended.append(actor))
            for actor in ("gone", "here", "gone", "")
        ]
        releases[2]()
        await asyncio.sleep(0.05)
        assert ended == ["gone"]
        for release in releases:
            release()
        await settled(callers)
        assert ended == ["gone"]

    run(scenario())


def test_a_cluster_that_cannot_be_asked_ends_nothing():
    async def scenario():
        ended, answers = [], iter([RuntimeError("busy"), RuntimeError("busy"), False])

        def is_alive(name):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        callers = Callers(is_alive)
        callers.hold("actor", lambda: ended.append(1))
        await settled(callers)
        assert ended == [1]
        assert next(answers, None) is None

    run(scenario())


def test_nobody_is_watched_while_nothing_is_held():
    async def scenario():
        asked = []
        callers = Callers(lambda name: bool(asked.append(name)) or True)
        with callers.holding("actor", lambda: None):
            await asyncio.sleep(0.03)
            assert asked
        await settled(callers)
        asked.clear()
        await asyncio.sleep(0.03)
        assert not asked

    run(scenario())
