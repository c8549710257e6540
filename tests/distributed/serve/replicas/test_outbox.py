"""Outboxes: one item per step for each ingress, whatever becomes of its calls."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from rayapp.distributed.serve.messages import Reader, row_of
from rayapp.distributed.serve.replicas import outbox as outboxes
from rayapp.distributed.serve.replicas.outbox import Outbox, Outboxes
from rayapp.engine.request import TokenBatch


class Answer:
    """A source of one answer's tokens."""

    def __init__(self, name):
        self.name, self.index, self.unread = name, 0, []

    def step(self, box):
        self.unread.append(TokenBatch(self.name, 0, self.index, (self.index,)))
        self.index += 1
        box.put(self)

    def take_unread(self):
        unread, self.unread = self.unread, []
        return unread


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 10))


def tokens_in(items):
    """The tokens of every answer, in the order in which they came."""
    found = {}
    for item in items:
        for name, _, first_index, token_ids, *_ in item:
            assert first_index == len(found.setdefault(name, []))
            found[name].extend(token_ids)
    return found


@pytest.fixture(autouse=True)
def _short_lingering(monkeypatch):
    monkeypatch.setattr(outboxes, "LINGER_S", 0.05)


def test_a_step_of_many_answers_is_one_item(monkeypatch):
    async def scenario():
        box, answers = Outbox(), [Answer(f"a{n}") for n in range(64)]
        for answer in answers:
            box.add(answer)
        items = []

        async def read():
            async for item in box.items():
                items.append(item)

        reading = asyncio.ensure_future(read())
        for _ in range(5):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for answer in answers:
                answer.step(box)
        await asyncio.sleep(0.01)
        for answer in answers:
            box.remove(answer)
        await reading  # it ends by itself
        assert [len(item) for item in items] == [64] * 5
        assert tokens_in(items) == {answer.name: [0, 1, 2, 3, 4] for answer in answers}
        assert not box.is_needed

    run(scenario())


def test_steps_that_nobody_took_are_one_item():
    async def scenario():
        box, answer = Outbox(), Answer("slow")
        box.add(answer)
        for _ in range(3):
            answer.step(box)
        async with aclosing(box.items()) as items:
            assert await anext(items) == [row_of(TokenBatch("slow", 0, 0, (0, 1, 2)))]

    run(scenario())


def test_between_two_calls_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(outboxes, "MAX_ITEMS", 3)

    async def scenario():
        box, answer, items = Outbox(), Answer("r"), []
        box.add(answer)

        async def read():
            while answer.index < 20 or answer.unread:
                async with aclosing(box.items()) as call:
                    async for item in call:
                        items.append(item)

        reading = asyncio.ensure_future(read())
        for number in range(20):
            answer.step(box)
            if number % 3:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        box.remove(answer)
        await reading
        assert tokens_in(items) == {"r": list(range(20))}

    run(scenario())


def test_a_new_call_ends_the_one_before_it():
    async def scenario():
        box, answer = Outbox(), Answer("r")
        box.add(answer)
        first, second = box.items(), box.items()
        waiting = asyncio.ensure_future(anext(first, None))
        await asyncio.sleep(0)
        newer = asyncio.ensure_future(anext(second))
        assert await waiting is None
        answer.step(box)
        assert tokens_in([await newer]) == {"r": [0]}
        await second.aclose()

    run(scenario())


def test_tokens_of_an_answer_that_has_left_are_dropped():
    async def scenario():
        box, answers = Outbox(), [Answer("left"), Answer("stays")]
        for answer in answers:
            box.add(answer)
            answer.step(box)
        box.remove(answers[0])
        async with aclosing(box.items()) as items:
            assert tokens_in([await anext(items)]) == {"stays": [0]}

    run(scenario())


def test_readers_have_outboxes_of_their_own_while_they_need_them():
    async def scenario():
        boxes, answer = Outboxes(), Answer("r")
        mine = boxes.of(Reader("one"))
        mine.add(answer)
        assert boxes.of(Reader("two")) is not mine
        assert boxes.of(Reader("one")) is mine
        mine.remove(answer)
        assert boxes.of(Reader("one")) is not mine

    run(scenario())
