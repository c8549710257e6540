"""The tokens of all streams of this ingress: one call per decode replica brings them.

A call for every stream would cost 0.6 ms of CPU per token where 64 streams run, and this costs 0.1
(`benchmarks/delivery.py`). The shared calls belong to no request: Serve cancels the calls of a
request whose client leaves, and these carry others' tokens. They are therefore made in tasks with
an empty context. Each lasts as long as its replica has answers for this ingress, and not much
longer, because a replica that is drained waits for its calls.

Beside it, every attempt has a call of its own that brings no tokens and ends with its answers
(``follow``, or the rest of ``generate``). It ends with the request, it makes a busy replica look
busy to Serve, it keeps a replica that is drained alive, and it says why an answer failed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any

from rayapp.distributed.serve.callers import this_actor
from rayapp.distributed.serve.ingress.calls import call
from rayapp.distributed.serve.ingress.phases import deadline_error
from rayapp.distributed.serve.messages import Address, Place, Reader
from rayapp.engine.request import PromptRequests, TokenBatch, merged_by_answer
from rayapp.errors import UnavailableError

ARRIVE_S = 10.0
"""How long tokens may be on their way after their replica has sent the last (project default)."""


class Inbox:
    """The tokens of one attempt at all answers to a prompt, as they arrive."""

    def __init__(self) -> None:
        self._batches: list[TokenBatch] = []
        self._error: BaseException | None = None
        self._arrival: asyncio.Future[None] | None = None

    def put(self, batch: TokenBatch) -> None:
        """Add a batch."""
        self._batches.append(batch)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Raise an error to the reader once it has taken all batches; the first error counts."""
        self._error = self._error or error
        self._wake()

    def note_end(self, following: asyncio.Future[Any]) -> None:
        """Take the error of a call that has ended; without one, all tokens are about to arrive."""
        if following.cancelled():
            return
        error = following.exception()
        if error is not None:
            self.fail(error)
            return
        lost = UnavailableError(
            f"tokens did not arrive within {ARRIVE_S:.0f} s after their replica had sent them; ask "
            "again"
        )
        asyncio.get_running_loop().call_later(ARRIVE_S, self.fail, lost)

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def batches(
        self, request_ids: Iterable[str], limit_s: float
    ) -> AsyncGenerator[TokenBatch, None]:
        """Generate the batches until every one of the answers has its last one.

        What has arrived while the caller was busy is one batch per answer.

        Raises:
            DeadlineError: They have not all ended within ``limit_s``.
        """
        loop = asyncio.get_running_loop()
        timer = loop.call_later(limit_s, lambda: self.fail(deadline_error("decode", limit_s)))
        unfinished = set(request_ids)
        try:
            while unfinished:
                arrived, self._batches = self._batches, []
                for batch in merged_by_answer(arrived):
                    if batch.finish_reason is not None:
                        unfinished.discard(batch.request_id)
                    yield batch
                if not (self._batches or arrived):
                    if self._error is not None:
                        raise self._error
                    self._arrival = loop.create_future()
                    await self._arrival
        finally:
            timer.cancel()


class Delivery:
    """Receives the tokens of all streams of this process.

    Args:
        pool: Serve's handle of the pool that decodes.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool.options(stream=True)
        self._inboxes: dict[tuple[str, int], Inbox] = {}
        self._expected: dict[str, set[Inbox]] = {}
        self._reading: dict[str, asyncio.Task[None]] = {}
        self.reader = Reader(uuid.uuid4().hex, this_actor())

    def address(self, **where: Any) -> Address:
        """The address of a call whose answers' tokens come here; the fields of :class:`Address`."""
        return Address(**where, reader=self.reader)

    @contextmanager
    def opened(self, prompt: PromptRequests) -> Iterator[Inbox]:
        """Receive the tokens of an attempt while the context lasts; later ones are dropped."""
        inbox = Inbox()
        keys = [(request.request_id, request.attempt) for request in prompt.requests]
        self._inboxes.update(dict.fromkeys(keys, inbox))
        try:
            yield inbox
        finally:
            for key in keys:
                del self._inboxes[key]
            for inboxes in self._expected.values():
                inboxes.discard(inbox)

    def listen(self, inbox: Inbox, place: Place, following: Awaitable[Any]) -> asyncio.Future[Any]:
        """Have the replica at ``place`` deliver into an inbox, and watch the attempt's own call.

        Returns:
            The attempt's own call, as a future.
        """
        name = place.replica_id
        self._expected.setdefault(name, set()).add(inbox)
        if name not in self._reading:
            reading = asyncio.get_running_loop().create_task(self._read(name), context=Context())
            self._reading[name] = reading
        future = asyncio.ensure_future(following)
        future.add_done_callback(inbox.note_end)
        return future

    async def _read(self, replica_id: str) -> None:
        """Call a replica again and again while tokens of it are expected."""
        inboxes = self._expected[replica_id]
        try:
            while inboxes:
                address = self.address(replica_id=replica_id)
                response = call(self._pool.deliver, address=address)
                try:
                    async for rows in response:
                        for row in rows:
                            self._sort_in(TokenBatch(*row))
                except asyncio.CancelledError:
                    response.cancel()
                    raise
                await asyncio.sleep(0)  # Even if calls end at once, others have their turn.
        except Exception as error:  # noqa: BLE001 - raised to whoever waits for the tokens
            for inbox in inboxes:
                inbox.fail(error)
        finally:
            del self._expected[replica_id], self._reading[replica_id]

    def _sort_in(self, batch: TokenBatch) -> None:
        inbox = self._inboxes.get((batch.request_id, batch.attempt))
        if inbox is not None:  # None: its reader has left, and the replica will hear of it.
            inbox.put(batch)
