"""A router of Serve that answers calls on cue, and a service over it; no cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import defaultdict
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, NamedTuple

from ray.serve.handle import DeploymentHandle

from rayapp.api.service import ServiceDescription
from rayapp.distributed.serve.channel import ObjectStoreChannel
from rayapp.distributed.serve.ingress.disaggregated import DisaggregatedAttempts
from rayapp.distributed.serve.ingress.ray_service import Limits, RayService
from rayapp.distributed.serve.ingress.unified import UnifiedAttempts
from rayapp.distributed.serve.messages import (
    Address,
    Admission,
    Copied,
    Place,
    PrefillAnswer,
    Reader,
    Seat,
    Versions,
    row_of,
)
from rayapp.distributed.serve.settings import Deadlines, ServiceSettings
from rayapp.engine.request import GenerationRequest, SamplingParams, TokenBatch
from rayapp.kv.ledger import KVShape, Ledger
from rayapp.kv.wire import MessageSizes
from rayapp.plan import PruningPlan

PROMPT, VERSIONS, PLACE = (1, 2), Versions("p", "w", "float32"), Place("replica", "node")
SHAPE = KVShape(num_blocks=1, num_kv_heads=1, head_dim=1, element_bytes=4, windows=(None,))
NUM_BYTES = SHAPE.dense_bytes(len(PROMPT))
PREFILLED = PrefillAnswer(PLACE, (), NUM_BYTES, queue_s=0.0, prefill_s=0.0)
BOOKED = Seat(PLACE, wait_s=0.0)
ADMITTED = Admission(PLACE, Copied(MessageSizes(NUM_BYTES, 0), 0.0, 0.0), wait_s=0.0)
EVERYBODY = Address("every replica")
# Ray keeps the task whose calls it cancels in such a variable, so a call outside has none.
RAY_TASK: ContextVar[str | None] = ContextVar("RAY_TASK", default=None)


def last_batch(request_id):
    return TokenBatch(request_id, 0, 0, (7,), "length")


class Routed:
    """The items of a call that a replica has answered."""

    def __init__(self, items):
        self.items = list(items)

    async def __anext__(self):
        if not self.items:
            raise StopAsyncIteration
        return self.items.pop(0)

    async def get_async(self):
        return self.items[0]

    def to_object_ref_gen(self):
        return References(self.items)

    def cancel(self):
        pass


class Delivering(Routed):
    """The tokens of all answers, as a replica delivers them; more may come at any time."""

    def __init__(self, outbox):
        super().__init__([])
        self.outbox = outbox

    async def __anext__(self):
        return await self.outbox.get()


class References:
    """The same items by reference."""

    def __init__(self, items):
        self.items = items

    async def __anext__(self):
        reference = asyncio.get_running_loop().create_future()
        reference.set_result(self.items.pop(0))
        return reference

    async def completed(self):
        pass


class Call(NamedTuple):
    """One call as Serve's router gets it; ``found`` is its replica, once there is one.

    ``ray_task`` is the task that it is a child of.
    """

    metadata: Any
    arguments: tuple[Any, ...]
    address: Address
    found: concurrent.futures.Future[Any]
    ray_task: str | None

    @property
    def name(self):
        return self.metadata.call_method


class Router:
    """A router in place of Serve's own: it routes only calls that have a script."""

    def __init__(self):
        kv = b"the message"
        self.scripts = {
            "book": lambda *_: [BOOKED],
            "prefill": lambda *_: [PREFILLED, kv],
            "admit": self.admit,
            "follow": lambda *_: [None],
            "deliver": lambda *_: Delivering(self.outbox),
            "cancel": lambda *_: [None],
            "generate": self.generate,
        }
        self.outboxes = defaultdict(asyncio.Queue)  # by reader
        self.reader = Reader()
        self.calls = []
        self.answers = asyncio.Event()  # whether anybody answers what all are asked
        self.answers.set()

    @property
    def outbox(self):
        """The outbox for whoever calls."""
        return self.outboxes[self.reader]

    def admit(self, handover, *_):
        return self.deliver(last_batch(handover.prompt.name))

    def generate(self, prompt, *_):
        return [PREFILLED, *self.deliver(last_batch(prompt.name))]

    def deliver(self, batch):
        """Admit an answer, and have this batch of it on its way to whoever calls."""
        self.outbox.put_nowait([row_of(batch)])
        return [ADMITTED]

    def assign_request(self, metadata, *arguments, address):
        found = concurrent.futures.Future()
        self.calls.append(Call(metadata, arguments, address, found, RAY_TASK.get()))
        script, self.reader = self.scripts.get(metadata.call_method), address.reader
        if script is not None:
            result = script(*arguments)
            found.set_result(Routed(result) if isinstance(result, list) else result)
        return found

    async def broadcast(self, metadata, *arguments):
        await self.answers.wait()
        found = concurrent.futures.Future()
        found.set_result(None)
        self.calls.append(Call(metadata, arguments, EVERYBODY, found, RAY_TASK.get()))
        return []

    @property
    def event_loop(self):
        return asyncio.get_running_loop()

    def handle(self, pool):
        return DeploymentHandle(pool, "rayapp", _create_router=lambda **_: self)


def service_over(router, tokenizer, *, mode="disaggregated", deadlines=Deadlines()):  # noqa: B008 - frozen
    channel, ledger = ObjectStoreChannel(), Ledger()
    if mode == "unified":
        attempts = UnifiedAttempts(router.handle("unified"), versions=VERSIONS, deadlines=deadlines)
    else:
        attempts = DisaggregatedAttempts(
            router.handle("prefill"),
            router.handle("decode"),
            channel=channel,
            ledger=ledger,
            plan=PruningPlan(),
            shape=SHAPE,
            versions=VERSIONS,
            settings=ServiceSettings(model="m", deadlines=deadlines),
        )
    return RayService(
        ServiceDescription("m", 64, 300, tokenizer),
        pools={},
        siblings=None,
        attempts=attempts,
        channel=channel,
        ledger=ledger,
        versions=VERSIONS,
        limits=Limits(max_waiting=8, max_attempts=3),
    )


async def tokens_of(service, name="r", max_tokens=1, num_batches=None):
    """The tokens of an answer; with ``num_batches``, of its first batches, and then it waits."""
    request = GenerationRequest(name, PROMPT, SamplingParams(max_tokens=max_tokens))
    tokens = []
    async with aclosing(service.generate([request])) as batches:
        async for batch in batches:
            tokens.extend(batch.token_ids)
            if num_batches is not None and len(tokens) == num_batches:
                await asyncio.sleep(60)
    return tokens
