"""A unified replica without a model: every running answer gains a token per step, at a set rate.

Its leases, its outboxes and its calls are those of a real replica, so it costs what delivering
costs, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from rayapp.api.service import ReplicaHealth
from rayapp.distributed.serve.messages import (
    ANY,
    Address,
    Admission,
    Copied,
    Place,
    PrefillAnswer,
    TokenRow,
    Versions,
)
from rayapp.distributed.serve.replicas.admission.leases import Lease, Leases
from rayapp.distributed.serve.replicas.serial_thread import SerialThread
from rayapp.distributed.serve.replicas.stage import this_place
from rayapp.engine.request import PromptRequests, TokenBatch, merged_by_answer
from rayapp.kv.wire import MessageSizes

_LETTERS = 26
_LONG_S = 600.0


class StandIn:
    """A replica that computes nothing.

    Args:
        steps_per_s: Rate of its engine.
        place: The replica and its node; None asks Serve.
    """

    def __init__(self, steps_per_s: float, place: Place | None = None) -> None:
        self._period_s = 1 / steps_per_s
        self._place = place or this_place()
        self._thread = SerialThread("engine")
        self._leases = Leases(lambda lease: None)
        self._next: dict[Lease, int] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._versions: Versions | None = None

    async def generate(
        self,
        prompt: PromptRequests,
        versions: Versions,
        sent: Mapping[str, Sequence[int]],
        address: Address = ANY,
    ) -> AsyncGenerator[PrefillAnswer | Admission, None]:
        """As a unified replica: the tokens leave by ``deliver``."""
        self._versions = versions
        lease = self._leases.grant(prompt, address.reader, total_s=_LONG_S)
        try:
            yield self._prefilled(prompt)
            yield self._admission
            self._begin(lease)
            await lease.all_read()
        finally:
            self._end(lease)

    async def stream(
        self, prompt: PromptRequests, versions: Versions, address: Address = ANY
    ) -> AsyncGenerator[PrefillAnswer | list[TokenBatch], None]:
        """The old way: the tokens of an attempt leave by its own call, an item per step."""
        lease = self._leases.grant(prompt, address.reader, total_s=_LONG_S)
        try:
            yield self._prefilled(prompt)
            self._begin(lease)
            while not lease.is_read:
                while not lease.unread:
                    lease.changed.clear()
                    await lease.changed.wait()
                yield merged_by_answer(lease.take_unread())
        finally:
            self._end(lease)

    async def deliver(self, address: Address = ANY) -> AsyncGenerator[list[TokenRow], None]:
        """As a real replica."""
        async for item in self._leases.outboxes.of(address.reader).items():
            yield item

    async def cancel(self, name: str, attempt: int, address: Address = ANY) -> None:
        """As a real replica."""
        self._leases.cancel(name, attempt)

    async def pid(self) -> int:
        """The process that this runs in."""
        return os.getpid()

    async def describe(self) -> ReplicaHealth:
        """Describe this replica for ``/health``: it fits whatever it was asked for."""
        found = self._versions
        return ReplicaHealth(
            pool="unified",
            replica_id=self._place.replica_id,
            node=self._place.node,
            parameter_bytes=0,
            plan_fingerprint=found.plan_fingerprint if found else "",
            weights_fingerprint=found.weights_fingerprint if found else "",
            dtype=found.dtype if found else "",
        )

    async def check_integrity(self) -> dict[str, int]:
        """Return the number of leases."""
        return {"leases": len(self._leases)}

    @property
    def _admission(self) -> Admission:
        nothing = Copied(MessageSizes(1, 0), fetch_s=0.0, copy_s=0.0)
        return Admission(self._place, nothing, wait_s=0.0)

    def _prefilled(self, prompt: PromptRequests) -> PrefillAnswer:
        firsts = tuple(TokenBatch(r.request_id, r.attempt, 0, (97,)) for r in prompt.requests)
        return PrefillAnswer(self._place, firsts, 1, queue_s=0.0, prefill_s=0.0)

    def _begin(self, lease: Lease) -> None:
        self._next[lease] = 1
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._step_on())

    def _end(self, lease: Lease) -> None:
        self._next.pop(lease, None)
        self._leases.end(lease)

    async def _step_on(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while self._next:
            due_s = max(due_s + self._period_s, loop.time() - 10 * self._period_s)
            await asyncio.sleep(due_s - loop.time())
            for lease, batch in await self._thread.run(self._step, dict(self._next)):
                lease.put(batch)
                lease.changed.set()

    def _step(self, running: dict[Lease, int]) -> list[tuple[Lease, TokenBatch]]:
        """The tokens of one step, made on the engine's thread."""
        made = []
        for lease, index in running.items():
            request = lease.prompt.prompt
            is_last = index + 1 >= request.sampling.max_tokens
            reason: Any = "length" if is_last else None
            token = 97 + index % _LETTERS
            made.append(
                (lease, TokenBatch(request.request_id, request.attempt, index, (token,), reason))
            )
            if is_last:
                self._next.pop(lease, None)
            elif lease in self._next:
                self._next[lease] = index + 1
        return made
