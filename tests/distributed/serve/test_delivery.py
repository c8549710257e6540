"""The ingress's side of delivery: streams that share a call, and leave it one by one."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from rayapp.distributed.serve.ingress import delivery as delivering
from rayapp.distributed.serve.ingress.delivery import Delivery, Inbox
from rayapp.distributed.serve.messages import Place, row_of
from rayapp.engine.request import GenerationRequest, PromptRequests, TokenBatch
from rayapp.errors import DeadlineError, UnavailableError

PLACE = Place("replica", "node")


class Replica:
    """A replica whose calls a test answers; also Serve's handle of its pool."""

    def __init__(self):
        self.calls = []
        self.deliver = SimpleNamespace(remote=self.open)

    def options(self, **_):
        return self

    def open(self, *, address):
        self.calls.append(Call(address))
        return self.calls[-1]


class Call:
    """One call of ``deliver``: items, an error, or an end come by its queue."""

    def __init__(self, address):
        self.address, self.items, self.cancelled = address, asyncio.Queue(), False

    def put(self, *batches):
        self.items.put_nowait([row_of(batch) for batch in batches])

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = await self.items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self):
        self.cancelled = True


def prompt_of(name, attempt=0):
    return PromptRequests.of([GenerationRequest(name, (1, 2), attempt=attempt)])


def batch_of(name, index, *, attempt=0, last=False):
    return TokenBatch(name, attempt, index, (index,), "length" if last else None)


async def tokens_of(inbox, name, limit_s=5.0):
    return [batch.token_ids async for batch in inbox.batches([name], limit_s)]


def pending():
    return asyncio.get_running_loop().create_future()


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 10))


def test_streams_of_one_replica_share_a_call_and_each_gets_its_own_tokens():
    async def scenario():
        replica, names = Replica(), "abc"
        delivery = Delivery(replica)
        with ExitStack() as stack:
            inboxes = [stack.enter_context(delivery.opened(prompt_of(name))) for name in names]
            for inbox in inboxes:
                delivery.listen(inbox, PLACE, pending())
            reading = [
                asyncio.ensure_future(tokens_of(i, n)) for i, n in zip(inboxes, names, strict=True)
            ]
            await asyncio.sleep(0)
            (call,) = replica.calls
            assert call.address.reader == delivery.reader
            call.put(*(batch_of(name, 0) for name in names), batch_of("stranger", 0))
            call.put(*(batch_of(name, 1, last=True) for name in names))
            assert await asyncio.gather(*reading) == [[(0, 1)]] * 3
        call.items.put_nowait(StopAsyncIteration())
        await asyncio.sleep(0.01)
        assert (replica.calls, delivery._reading) == ([call], {})

    run(scenario())


def test_a_call_that_ends_is_made_again_while_tokens_are_expected():
    async def scenario():
        replica = Replica()
        delivery = Delivery(replica)
        with delivery.opened(prompt_of("r")) as inbox:
            delivery.listen(inbox, PLACE, pending())
            reading = asyncio.ensure_future(tokens_of(inbox, "r"))
            await asyncio.sleep(0)
            replica.calls[0].put(batch_of("r", 0))
            replica.calls[0].items.put_nowait(StopAsyncIteration())
            await asyncio.sleep(0.01)
            replica.calls[1].put(batch_of("r", 1, last=True))
            assert await reading == [(0,), (1,)]

    run(scenario())


@pytest.mark.parametrize("broken", ["shared", "own"])
def test_a_broken_call_ends_its_streams_after_what_has_arrived(broken):
    async def scenario():
        replica = Replica()
        delivery = Delivery(replica)
        with delivery.opened(prompt_of("r")) as inbox, delivery.opened(prompt_of("s")) as other:
            following = pending()
            delivery.listen(inbox, PLACE, following)
            delivery.listen(other, Place("another", "node"), pending())
            await asyncio.sleep(0)
            call = replica.calls[0]
            call.put(batch_of("r", 0))
            await asyncio.sleep(0.01)
            if broken == "shared":
                call.items.put_nowait(UnavailableError("it died"))
            else:
                following.set_exception(UnavailableError("it died"))
            batches = inbox.batches(["r"], 5.0)
            assert (await anext(batches)).token_ids == (0,)
            with pytest.raises(UnavailableError, match="it died"):
                await anext(batches)
            replica.calls[1].put(batch_of("s", 0, last=True))
            assert await tokens_of(other, "s") == [(0,)]

    run(scenario())


def test_tokens_of_an_earlier_attempt_are_dropped():
    async def scenario():
        replica = Replica()
        delivery = Delivery(replica)
        with delivery.opened(prompt_of("r", attempt=1)) as inbox:
            delivery.listen(inbox, PLACE, pending())
            await asyncio.sleep(0)
            replica.calls[0].put(batch_of("r", 7))
            replica.calls[0].put(batch_of("r", 0, attempt=1, last=True))
            assert await tokens_of(inbox, "r") == [(0,)]

    run(scenario())


def test_what_came_while_the_reader_was_busy_is_one_batch():
    async def scenario():
        inbox = Inbox()
        for index in range(4):
            inbox.put(batch_of("r", index, last=index == 3))
        assert await tokens_of(inbox, "r") == [(0, 1, 2, 3)]

    run(scenario())


def test_an_answer_has_a_deadline():
    async def scenario():
        with pytest.raises(DeadlineError, match=r"^decode did not end within 0\.1 s"):
            await tokens_of(Inbox(), "r", limit_s=0.05)

    run(scenario())


def test_only_its_replica_ends_a_call_so_that_none_takes_tokens_which_nobody_reads():
    async def scenario():
        replica = Replica()
        delivery = Delivery(replica)
        with delivery.opened(prompt_of("r")) as inbox:
            delivery.listen(inbox, PLACE, pending())
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        with delivery.opened(prompt_of("s")) as inbox:
            delivery.listen(inbox, PLACE, pending())
            replica.calls[0].put(batch_of("s", 0, last=True))
            assert await tokens_of(inbox, "s") == [(0,)]
        (call,) = replica.calls
        assert not call.cancelled

    run(scenario())


def test_tokens_that_are_lost_on_their_way_are_an_error(monkeypatch):
    monkeypatch.setattr(delivering, "ARRIVE_S", 0.05)

    async def scenario():
        delivery, following = Delivery(Replica()), pending()
        with delivery.opened(prompt_of("r")) as inbox:
            delivery.listen(inbox, PLACE, following)
            following.set_result(None)
            with pytest.raises(UnavailableError, match="tokens did not arrive within 0 s"):
                await tokens_of(inbox, "r")

    run(scenario())
