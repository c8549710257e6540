"""Leases on decode slots: their owners, the tokens that wait to be read, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from rayapp.engine.request import GenerationRequest, TokenBatch, merged
from rayapp.errors import DeadlineError, TransferError, UnavailableError

# Cancelled requests that are remembered, the latest ones: far more than can be on their way here.
_MAX_CANCELLED = 4096


@dataclass(eq=False)
class Lease:
    """The lease of one admitted attempt, whose slot is in use until the answer or the lease ends.

    ``unread`` are batches that nobody has taken yet; ``error`` is the reason why no more will come.
    """

    request: GenerationRequest
    unread: list[TokenBatch] = field(default_factory=list)
    error: Exception | None = None
    has_reader: bool = False
    holds_slot: bool = True
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """The lease's key: request and attempt."""
        return self.request.request_id, self.request.attempt

    def put(self, batch: TokenBatch) -> None:
        """Add a batch for the reader."""
        self.unread.append(batch)
        self.changed.set()

    def fail(self, error: Exception) -> None:
        """Tell the reader that no more tokens will come, and why."""
        self.error = error
        self.changed.set()

    def check(self) -> None:
        """Raise the lease's error, if it has one."""
        if self.error is not None:
            raise self.error

    async def take(self) -> TokenBatch:
        """Return all tokens since the last call as one batch."""
        while not self.unread:
            self.check()
            self.changed.clear()
            await self.changed.wait()
        batches, self.unread = self.unread, []
        return merged(batches)


class Leases:
    """The leases of one replica.

    Args:
        on_end: Called with a lease that ends for whatever reason, to free its slot.
    """

    def __init__(self, on_end: Callable[[Lease], None]) -> None:
        self._leases: dict[tuple[str, int], Lease] = {}
        self._cancelled: dict[str, int] = {}
        self._on_end = on_end

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, request: GenerationRequest, *, total_s: float) -> Lease:
        """Grant a new lease, which ends by itself after ``total_s``.

        Raises:
            TransferError: The attempt has a lease already.
            UnavailableError: The attempt was cancelled before it came.
        """
        self.check_not_cancelled(request)
        lease = Lease(request)
        if lease.key in self._leases:
            raise TransferError(f"{lease.key} holds a slot here already; prefill it again")
        self._leases[lease.key] = lease
        self._limit(lease, "it did not finish", total_s)
        return lease

    def cancel(self, request_id: str, attempt: int) -> None:
        """End the lease of this attempt or an earlier one; an attempt that comes later gets none.

        Nothing orders a call and its cancellation on their way here: the cancellation may come
        first, and without a memory of it the lease would last until its time is up.
        """
        self._cancelled[request_id] = max(attempt, self._cancelled.pop(request_id, attempt))
        if len(self._cancelled) > _MAX_CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]
        lease = self.newest(request_id)
        if lease is not None and lease.request.attempt <= attempt:
            lease.fail(UnavailableError(f"request {request_id} was cancelled"))
            self.end(lease)

    def check_not_cancelled(self, request: GenerationRequest) -> None:
        """Raise :class:`UnavailableError` if this attempt has been cancelled."""
        if request.attempt <= self._cancelled.get(request.request_id, -1):
            raise UnavailableError(f"request {request.request_id} was cancelled before it came")

    def expect_reader(self, lease: Lease, within_s: float) -> None:
        """End the lease if nobody reads it within ``within_s``."""
        if not lease.has_reader:
            self._limit(lease, "nobody read its tokens", within_s)

    def get(self, request_id: str, attempt: int) -> Lease | None:
        """Return the lease of an attempt, None if there is none."""
        return self._leases.get((request_id, attempt))

    def find(self, request_id: str, attempt: int) -> Lease:
        """Return the lease of an attempt, or raise :class:`UnavailableError` if there is none."""
        lease = self.get(request_id, attempt)
        if lease is None:
            raise UnavailableError(
                f"request {request_id}, attempt {attempt} holds no slot here; prefill it again"
            )
        return lease

    def newest(self, request_id: str) -> Lease | None:
        """Return the lease of a request's latest attempt, None if it has none."""
        mine = [lease for (name, _), lease in self._leases.items() if name == request_id]
        return max(mine, key=lambda lease: lease.request.attempt, default=None)

    def read(self, lease: Lease) -> None:
        """Note that a reader has come, so that the lease no longer ends for want of one."""
        lease.has_reader = True
        for timer in lease.timers[1:]:
            timer.cancel()

    def end(self, lease: Lease) -> None:
        """End a lease; a second call is harmless."""
        if self._leases.pop(lease.key, None) is not None:
            for timer in lease.timers:
                timer.cancel()
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
                f"request {lease.request.request_id}: {reason} within {seconds:.1f} s; "
                "its slot was freed"
            )
        )
        self.end(lease)
