"""Leases on decode slots: their owners, the tokens that wait to be read, and their end.

A lease belongs to one attempt at all answers of a prompt; each answer has a slot of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from rayapp.distributed.serve.callers import Callers
from rayapp.distributed.serve.messages import Reader
from rayapp.distributed.serve.replicas.admission.placing import Incoming
from rayapp.distributed.serve.replicas.outbox import Outbox, Outboxes
from rayapp.engine.request import GenerationRequest, PromptRequests, TokenBatch
from rayapp.errors import DeadlineError, TransferError, UnavailableError

# Cancelled requests that are remembered, the latest ones: far more than can be on their way here.
_MAX_CANCELLED = 4096


@dataclass(eq=False)
class Lease:
    """The lease of one admitted attempt; it lasts until all its answers or the lease end.

    ``waiting`` are requests that have no slot yet, ``seated`` the names of those that hold one, and
    ``unfinished`` of those whose answer goes on; ``seating`` is the task that gives slots to the
    waiting ones. ``incoming`` is the KV that comes in parts. ``unread`` are batches that ``outbox``
    has not sent yet; ``error`` is the reason why no more will come. ``release`` is called when the
    lease ends.
    """

    prompt: PromptRequests
    outbox: Outbox = field(default_factory=Outbox)
    release: Callable[[], None] = lambda: None
    waiting: deque[GenerationRequest] = field(init=False)
    unfinished: set[str] = field(init=False)
    seated: set[str] = field(default_factory=set)
    unread: list[TokenBatch] = field(default_factory=list)
    error: Exception | None = None
    has_reader: bool = False
    seating: asyncio.Task[None] | None = None
    incoming: Incoming | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = deque(self.prompt.requests)
        self.unfinished = {request.request_id for request in self.prompt.requests}

    @property
    def key(self) -> tuple[str, int]:
        """The lease's key: name of the prompt's requests, and attempt."""
        return self.prompt.key

    @property
    def is_read(self) -> bool:
        """True if every answer has ended and all tokens were taken."""
        return not self.unfinished and not self.unread

    def seat(self) -> GenerationRequest:
        """Give a slot to the first request that has none."""
        request = self.waiting.popleft()
        self.seated.add(request.request_id)
        return request

    def expect_part(self, part: int) -> Incoming:
        """The KV that comes in parts, of which this one is to come next; it is counted as come.

        Raises:
            TransferError: Another part is to come next, or none.
        """
        expected = None if self.incoming is None else self.incoming.num_parts
        if self.incoming is None or part != expected:
            raise TransferError(
                f"part {part} of the KV of {self.key} came, expected part {expected}; prefill the "
                "prompt again"
            )
        self.incoming.num_parts += 1
        return self.incoming

    def let_ended_go(self, going_on: Collection[str]) -> list[str]:
        """Forget answers that ended with their first token; return those that hold slots."""
        self.waiting = deque(r for r in self.waiting if r.request_id in going_on)
        self.unfinished &= set(going_on)
        return [name for name in self.seated if name not in going_on]

    def put(self, batch: TokenBatch) -> None:
        """Add a batch for the reader."""
        self.unread.append(batch)
        if batch.finish_reason:
            self.unfinished.discard(batch.request_id)
        self.outbox.put(self)

    def fail(self, error: Exception) -> None:
        """Tell the reader that no more tokens will come, and why."""
        self.error = error
        self.changed.set()

    def check(self) -> None:
        """Raise the lease's error, if it has one."""
        if self.error is not None:
            raise self.error

    def take_unread(self) -> list[TokenBatch]:
        """Return all tokens since the last call."""
        batches, self.unread = self.unread, []
        if not self.unfinished:
            self.changed.set()
        return batches

    async def all_read(self) -> None:
        """Return once every answer has ended and all tokens were taken; raise once it failed."""
        while not self.is_read:
            self.check()
            self.changed.clear()
            await self.changed.wait()


class Leases:
    """The leases of one replica.

    Args:
        on_end: Called with a lease that ends for whatever reason, to free its slots.

    Attributes:
        callers: The watch on the processes that leases are for.
        outboxes: The tokens on their way to these processes.
    """

    def __init__(self, on_end: Callable[[Lease], None]) -> None:
        self._leases: dict[tuple[str, int], Lease] = {}
        self._of_answers: dict[tuple[str, int], Lease] = {}
        self._cancelled: dict[str, int] = {}
        self._on_end = on_end
        self.callers = Callers()
        self.outboxes = Outboxes()

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, prompt: PromptRequests, reader: Reader, *, total_s: float) -> Lease:
        """Grant a new lease, which ends by itself after ``total_s``, or with its reader.

        Args:
            prompt: The requests for all answers, with their attempt.
            reader: Who reads the tokens.
            total_s: Longest time until the last token, seconds.

        Raises:
            TransferError: The attempt has a lease already.
            UnavailableError: The attempt was cancelled before it came.
        """
        self.check_not_cancelled(prompt)
        lease = Lease(prompt, self.outboxes.of(reader))
        if lease.key in self._leases:
            raise TransferError(f"{lease.key} holds a slot here already; prefill it again")
        self._leases[lease.key] = lease
        lease.outbox.add(lease)
        lease.release = self.callers.hold(reader.actor, partial(self.cancel, *prompt.key))
        self._of_answers.update(dict.fromkeys(_answers(lease), lease))
        self._limit(lease, "it did not finish", total_s)
        return lease

    @contextmanager
    def wanted_by(self, reader: Reader) -> Iterator[None]:
        """Cancel the current task if the process of ``reader`` dies within the context."""
        task = asyncio.current_task()
        with self.callers.holding(reader.actor, task.cancel if task else lambda: None):
            yield

    def cancel(self, name: str, attempt: int) -> None:
        """End the lease of this attempt or an earlier one; an attempt that comes later gets none.

        Nothing orders a call and its cancellation on their way here: the cancellation may come
        first, and without a memory of it the lease would last until its time is up.
        """
        self._cancelled[name] = max(attempt, self._cancelled.pop(name, attempt))
        if len(self._cancelled) > _MAX_CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]
        lease = self.newest(name)
        if lease is not None and lease.prompt.attempt <= attempt:
            lease.fail(UnavailableError(f"request {name} was cancelled"))
            self.end(lease)

    def check_not_cancelled(self, prompt: PromptRequests) -> None:
        """Raise :class:`UnavailableError` if this attempt has been cancelled."""
        if prompt.attempt <= self._cancelled.get(prompt.name, -1):
            raise UnavailableError(f"request {prompt.name} was cancelled before it came")

    def expect_reader(self, lease: Lease, within_s: float) -> None:
        """End the lease if nobody reads it within ``within_s``."""
        if not lease.has_reader:
            self._limit(lease, "nobody read its tokens", within_s)

    def of_answer(self, request_id: str, attempt: int) -> Lease | None:
        """Return the lease that an answer belongs to, None if it has ended."""
        return self._of_answers.get((request_id, attempt))

    def find(self, name: str, attempt: int) -> Lease:
        """Return the lease of an attempt, or raise :class:`UnavailableError` if there is none."""
        lease = self._leases.get((name, attempt))
        if lease is None:
            raise UnavailableError(
                f"request {name}, attempt {attempt} holds no slot here; prefill it again"
            )
        return lease

    def newest(self, name: str) -> Lease | None:
        """Return the lease of a prompt's latest attempt, None if it has none."""
        mine = [lease for (owner, _), lease in self._leases.items() if owner == name]
        return max(mine, key=lambda lease: lease.prompt.attempt, default=None)

    def read(self, lease: Lease) -> None:
        """Note that a reader has come, so that the lease no longer ends for want of one."""
        lease.has_reader = True
        for timer in lease.timers[1:]:
            timer.cancel()

    def end(self, lease: Lease) -> None:
        """End a lease; a second call is harmless."""
        if self._leases.pop(lease.key, None) is not None:
            for answer in _answers(lease):
                self._of_answers.pop(answer, None)
            for timer in lease.timers:
                timer.cancel()
            lease.outbox.remove(lease)
            lease.release()
            self._on_end(lease)

    def all(self) -> list[Lease]:
        """Return all leases of this replica."""
        return list(self._leases.values())

    def _limit(self, lease: Lease, reason: str, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        lease.timers.append(loop.call_later(seconds, self._expire, lease, reason, seconds))

    def _expire(self, lease: Lease, reason: str, seconds: float) -> None:
        lease.fail(
            DeadlineError(
                f"request {lease.prompt.name}: {reason} within {seconds:.1f} s; "
                "its slots were freed"
            )
        )
        self.end(lease)


def _answers(lease: Lease) -> list[tuple[str, int]]:
    """Names and attempts of the answers of a lease."""
    return [(request.request_id, request.attempt) for request in lease.prompt.requests]
