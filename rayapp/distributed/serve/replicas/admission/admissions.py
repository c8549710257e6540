"""Admission of prompts to a decode replica: a lease on slots, pages, and KV that comes into them.

Room is booked before a prompt is prefilled, and the booking ends with the slot that it led to.

KV comes whole, in one call, or in parts: then slots and pages are reserved first, while prefill
still computes, and the last part comes with the first tokens.

A prompt with several answers is admitted as soon as one of them has a slot and pages. The others
take what is free, and wait here for more, with a copy of the KV in host memory: more answers than
there is room for run in turns, and nobody waits for room that it holds itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from rayapp.distributed.serve.messages import (
    Admission,
    Copied,
    Handover,
    Place,
    Reader,
    Seat,
    Seating,
    Versions,
)
from rayapp.distributed.serve.replicas.admission.bookings import Booking, Bookings
from rayapp.distributed.serve.replicas.admission.leases import Lease, Leases
from rayapp.distributed.serve.replicas.admission.placing import Incoming, Known, Placing
from rayapp.distributed.serve.replicas.engine_loop import failure_of
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.request import GenerationRequest, PromptRequests
from rayapp.errors import DeadlineError, UnavailableError
from rayapp.kv.parts import joined
from rayapp.kv.pieces import Arrival
from rayapp.kv.segment import KVSegment
from rayapp.kv.wire import Envelope, message_sizes

logger = logging.getLogger(__name__)


class Admissions:
    """Admits prompts with their KV, whole or in parts.

    Args:
        place: The replica and the node.
        versions: The plan, weights and type of the replica.
        fetch: The function that gets a message from its handle.
        bookings: The bookings of room, and the slots of answers.
        leases: The leases on them.
        placing: The way into the engine.
        let_go: Frees the slot of one answer of a lease.
        deadlines: The deadlines of leases and answers.
    """

    def __init__(
        self,
        place: Place,
        versions: Versions,
        *,
        fetch: Callable[..., Awaitable[Arrival]],
        bookings: Bookings,
        leases: Leases,
        placing: Placing,
        let_go: Callable[[Lease, str], None],
        deadlines: Deadlines,
    ) -> None:
        self._place = place
        self._versions = versions
        self._fetch = fetch
        self._bookings = bookings
        self._slots = bookings.slots
        self._leases = leases
        self._placing = placing
        self._let_go = let_go
        self._deadlines = deadlines
        self._seating: set[asyncio.Task[None]] = set()
        self.num_applying = 0

    async def book(self, prompt: PromptRequests, pages: int, reader: Reader, wait_s: float) -> Seat:
        """Promise room for answers to a prompt that is then prefilled.

        The booking ends with the slot that the KV gets, with the attempt, with the caller, or when
        the KV should have come long ago.

        Args:
            prompt: The requests for all answers, with their attempt.
            pages: Pages that one answer will come to by forecast.
            reader: Who reads the tokens.
            wait_s: Longest wait for room, seconds.

        Raises:
            DeadlineError: There was no room in time.
            UnavailableError: The attempt was cancelled.
        """
        began_s = time.monotonic()
        self._leases.check_not_cancelled(prompt)
        with self._leases.wanted_by(reader):
            async with self._room_within(wait_s):
                booking = await self._bookings.take(prompt, pages)
        self._limit(booking, reader)
        try:
            self._leases.check_not_cancelled(prompt)
        except BaseException:
            self._bookings.end(booking)
            raise
        return Seat(self._place, time.monotonic() - began_s)

    def _limit(self, booking: Booking, reader: Reader) -> None:
        """End a booking with its caller, or when its time is up."""
        limits, end = self._deadlines, partial(self._bookings.end, booking)
        within_s = 2 * limits.queue_s + limits.prefill_s + limits.transfer_s
        timer = asyncio.get_running_loop().call_later(within_s, end)
        booking.releases.extend((timer.cancel, self._leases.callers.hold(reader.actor, end)))

    async def reserve(self, seating: Seating, reader: Reader) -> Seat:
        """Reserve slots and pages for KV that is still computed; the lease lasts from here on.

        Raises:
            DeadlineError: No slot or no pages were free in time.
            UnavailableError: The attempt was cancelled, or replaced by a later one.
        """
        began_s = time.monotonic()
        async with self._lease(seating.prompt, reader, seating.wait_s) as lease:
            seated = await self._seats(lease)
            async with self._room_within(seating.wait_s):
                lease.incoming = await self._placing.expect(
                    seating.extent, seated, keeps=bool(lease.waiting)
                )
            if lease.error is not None:
                self._placing.release(lease.incoming)
            lease.check()
        limits = self._deadlines
        self._leases.expect_reader(lease, limits.queue_s + limits.prefill_s + limits.transfer_s)
        return Seat(self._place, time.monotonic() - began_s)

    async def load(self, name: str, attempt: int, part: int, handle: object) -> Copied:
        """Copy the next part of the KV into pages that were reserved.

        The lease ends if that fails: a part that was lost or damaged is not sent again.

        Raises:
            UnavailableError: The attempt has no lease here.
            TransferError: It is not the part that comes next, or is lost or damaged.
        """
        lease = self._leases.find(name, attempt)
        envelope = self._versions.envelope(name, attempt)
        envelope = replace(envelope, part=part, is_last=False)
        return await self._load_part(lease, lease.expect_part(part), envelope, handle)

    async def admit(self, handover: Handover, handle: object, reader: Reader) -> Admission:
        """Copy the KV, or its last part, into slots; return once the message is no longer needed.

        Raises:
            DeadlineError: No slot was free in time.
            WireError: The message is not this prompt's KV, or is damaged.
            TransferError: The message is lost.
            UnavailableError: The attempt was cancelled, or replaced by a later one.
        """
        began_s = time.monotonic()
        if handover.part:
            lease = self._leases.find(*handover.prompt.key)
            wait_s, copied = 0.0, await self._load_last(handover, handle, lease)
        else:
            async with self._lease(handover.prompt, reader, handover.wait_s) as lease:
                wait_s = time.monotonic() - began_s
                copied = await self._load_whole(handover, handle, lease)
        self._leases.expect_reader(lease, self._deadlines.lease_s)
        return Admission(place=self._place, copied=copied, wait_s=wait_s)

    @asynccontextmanager
    async def _lease(
        self, prompt: PromptRequests, reader: Reader, wait_s: float
    ) -> AsyncGenerator[Lease, None]:
        """Grant a lease once a slot is free; it ends if the body raises."""
        lease = await self._take_lease(prompt, reader, wait_s)
        try:
            yield lease
        except BaseException:
            self._leases.end(lease)
            raise

    async def _take_lease(self, prompt: PromptRequests, reader: Reader, wait_s: float) -> Lease:
        """Wait for a slot; an older attempt of the prompt loses its slots first."""
        self._leases.check_not_cancelled(prompt)
        older = self._leases.newest(prompt.name)
        if older is not None and older.prompt.attempt < prompt.attempt:
            older.fail(UnavailableError(f"{older.key} was replaced by a later attempt"))
            self._leases.end(older)
        self.num_applying += len(prompt.requests)
        self._bookings.note_arrival(prompt)
        try:
            with self._leases.wanted_by(reader):
                async with asyncio.timeout(wait_s):
                    await self._slots.take()
        except TimeoutError:
            raise DeadlineError(
                f"no decode slot within {wait_s:.1f} s; try again later, raise "
                "max_num_seqs or add replicas"
            ) from None
        finally:
            self.num_applying -= len(prompt.requests)
            self._bookings.end_of(prompt)
        try:
            lease = self._leases.grant(prompt, reader, total_s=self._deadlines.decode_s)
        except BaseException:
            self._slots.give()
            raise
        lease.seat()
        return lease

    async def _seats(self, lease: Lease) -> list[GenerationRequest]:
        """Seat as many answers of a lease as there are free slots, the first in any case."""
        seated = [lease.prompt.prompt]
        while lease.waiting and self._slots.is_any_free:
            await self._slots.take()  # It is free, so this does not wait.
            seated.append(lease.seat())
        return seated

    @asynccontextmanager
    async def _room_within(self, wait_s: float) -> AsyncGenerator[None, None]:
        try:
            async with asyncio.timeout(wait_s):
                yield
        except TimeoutError:
            raise DeadlineError(
                f"no room for the prompt's KV within {wait_s:.1f} s; try again later, "
                "raise kv_memory or add replicas"
            ) from None

    async def _fetched(self, lease: Lease, handle: object) -> tuple[Arrival, float]:
        began_s = time.monotonic()
        message = await self._fetch(handle)
        lease.check()
        return message, time.monotonic() - began_s

    async def _load_whole(self, handover: Handover, handle: object, lease: Lease) -> Copied:
        """Fetch, check and copy a message; no part of it is referenced when this returns.

        A lease that ends before the copy begins prevents it. A lease that ends later frees its
        slots on the engine's thread, and so after the copy.
        """
        message, fetch_s = await self._fetched(lease, handle)
        began_s = time.monotonic()
        envelope, known = handover.envelope, handover.known_by_name
        seated = await self._seats(lease)
        async with self._room_within(handover.wait_s):
            left = await self._placing.land(message, envelope, seated, known, lease.check)
        lease.check()
        if left or lease.waiting:
            segment = await self._placing.kept(message, envelope)
            lease.check()
            self._go_on_seating(lease, left, segment, known)
        return Copied(message_sizes(message), fetch_s, time.monotonic() - began_s)

    async def _load_part(
        self, lease: Lease, incoming: Incoming, envelope: Envelope, handle: object
    ) -> Copied:
        """Fetch, check and copy one part; the lease ends if that fails."""
        try:
            message, fetch_s = await self._fetched(lease, handle)
            began_s = time.monotonic()
            await self._placing.load(incoming, message, envelope)
            lease.check()
        except BaseException:
            self._leases.end(lease)
            raise
        return Copied(message_sizes(message), fetch_s, time.monotonic() - began_s)

    async def _load_last(self, handover: Handover, handle: object, lease: Lease) -> Copied:
        """Copy the last part, and let the answers that go on begin."""
        incoming, known = lease.expect_part(handover.part), handover.known_by_name
        copied = await self._load_part(lease, incoming, handover.envelope, handle)
        try:
            await self._placing.commit(incoming, known)
            lease.check()
        except BaseException:
            self._leases.end(lease)
            raise
        for ended in lease.let_ended_go(known):
            self._let_go(lease, ended)
        left = [request for request in incoming.left if request.request_id in known]
        if left or lease.waiting:
            self._go_on_seating(lease, left, joined(incoming.kept), known)
        incoming.kept.clear()
        return copied

    def _go_on_seating(
        self, lease: Lease, left: Sequence[GenerationRequest], segment: KVSegment, known: Known
    ) -> None:
        """Place the answers that found no room, then those without slots, as room is made."""
        task = asyncio.get_running_loop().create_task(self._seat_rest(lease, left, segment, known))
        self._seating.add(task)
        task.add_done_callback(self._seating.discard)
        lease.seating = task

    async def _seat_rest(
        self, lease: Lease, left: Sequence[GenerationRequest], segment: KVSegment, known: Known
    ) -> None:
        try:
            while left or lease.waiting:
                if not left:
                    await self._slots.take()
                    left = (lease.seat(),)
                left = await self._placing.place(segment, left, known, lease.check)
        except Exception as error:
            logger.exception("an answer that waited for room could not begin")
            lease.fail(failure_of(error, "decode"))
            self._leases.end(lease)
