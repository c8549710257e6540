"""Answers get their pages, which are taken in the engine's turn and filled beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rayapp.distributed.serve.replicas.admission.slots import Slots
from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.serial_thread import SerialThread
from rayapp.engine.decode import DecodeEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sequences.running import AnswerStart, Reservation
from rayapp.errors import OverloadedError
from rayapp.kv.landing import land
from rayapp.kv.pieces import Arrival
from rayapp.kv.segment import KVExtent, KVSegment
from rayapp.kv.wire import Envelope, extent_of

Known = Mapping[str, tuple[int, ...]]
"""The tokens with which answers begin, by request id."""


@dataclass(eq=False)
class Incoming:
    """The KV of a prompt that comes into pages which were taken for it, whole or part by part.

    Args:
        reservation: The pages.
        left: Requests that found no pages together with those of the reservation.
        keeps: True if answers will begin later, for which a copy of the KV is kept.
    """

    reservation: Reservation
    left: tuple[GenerationRequest, ...]
    keeps: bool
    num_parts: int = 0
    is_closed: bool = False
    kept: list[KVSegment] = field(default_factory=list)


class Placing:
    """Puts answers that have slots into the engine, and takes them out again.

    Args:
        engine: The decode engine.
        loop: The loop that steps the engine, woken once answers are placed.
        copying: The thread that fills pages.
        slots: The slots, whose news says that room for KV may have been made.
    """

    def __init__(
        self, engine: DecodeEngine, loop: EngineLoop, copying: SerialThread, slots: Slots
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._thread = loop.thread
        self._copying = copying
        self._slots = slots
        self._attempts: dict[str, int] = {}

    async def place(
        self,
        segment: KVSegment,
        requests: Sequence[GenerationRequest],
        known: Known,
        check: Callable[[], None],
    ) -> Sequence[GenerationRequest]:
        """Copy the KV into pages for the answers, which share those of the prompt.

        Answers that find no room together are left, but for the first, which waits for room.

        Args:
            segment: The KV of their prompt.
            requests: The answers to place, which have slots.
            known: The tokens with which they begin.
            check: Raises if they are not wanted any more.

        Returns:
            The answers that are left.
        """

        def copy(reservation: Reservation) -> None:
            reservation.load(segment)

        return await self._placed(segment.extent, requests, known, check, copy)

    async def land(
        self,
        message: Arrival,
        envelope: Envelope,
        requests: Sequence[GenerationRequest],
        known: Known,
        check: Callable[[], None],
    ) -> Sequence[GenerationRequest]:
        """Copy the KV of a message straight into pages for the answers; else as :meth:`place`.

        Raises:
            WireError: The message is damaged or another's.
        """

        def copy(reservation: Reservation) -> None:
            reservation.load(land(message, envelope, reservation))

        extent = extent_of(message, envelope)
        return await self._placed(extent, requests, known, check, copy)

    async def _placed(
        self,
        extent: KVExtent,
        requests: Sequence[GenerationRequest],
        known: Known,
        check: Callable[[], None],
        copy: Callable[[Reservation], None],
    ) -> Sequence[GenerationRequest]:
        incoming = await self.expect(extent, requests)
        try:
            await self._copying.finish(copy, incoming.reservation)
            check()
            await self.commit(incoming, known)
        except BaseException:
            self.release(incoming)
            raise
        return incoming.left

    async def expect(
        self, extent: KVExtent, requests: Sequence[GenerationRequest], *, keeps: bool = False
    ) -> Incoming:
        """Take pages for KV that is to come, perhaps while it is still computed.

        It ends with :meth:`commit` or :meth:`release`.

        Args:
            extent: The lengths of the prompt.
            requests: The answers to it that have slots. If they find no room together, the first
                waits for room and the others are left.
            keeps: True if other answers to it, which have no slots yet, will need a copy.
        """
        left: Sequence[GenerationRequest] = ()
        try:
            reservation = await self._taken(extent, requests)
        except OverloadedError:
            requests, left = requests[:1], requests[1:]
            reservation = await self._reserved(extent, requests)
        return Incoming(reservation, tuple(left), keeps or bool(left))

    async def load(self, incoming: Incoming, message: Arrival, envelope: Envelope) -> None:
        """Check a message and copy its KV into the pages, beside the engine.

        Nothing refers to the message when this returns or raises.

        Raises:
            WireError: The message is damaged, or is not what comes next.
        """
        await self._copying.finish(_load, incoming, message, envelope)

    async def kept(self, message: Arrival, envelope: Envelope) -> KVSegment:
        """Copy the KV of a message, beside the engine, into memory that is no page.

        Raises:
            WireError: The message is damaged or another's.
        """
        return await self._copying.finish(land, message, envelope)

    async def commit(self, incoming: Incoming, known: Known) -> None:
        """Let the answers with known beginnings take part in the next step; the others give way.

        Raises:
            WireError: Parts of the KV are missing.
        """
        await self._thread.finish(self._commit, incoming, known)
        self._loop.wake()

    def release(self, incoming: Incoming) -> asyncio.Future[None]:
        """Give the pages back once nothing is copied into them any more, unless committed."""
        incoming.is_closed = True
        return asyncio.ensure_future(self._release(incoming.reservation))

    def free(self, request_id: str, attempt: int) -> asyncio.Future[None]:
        """Take this attempt at an answer out, not a later one, in the engine's turn."""
        return self._thread.submit(self._free, request_id, attempt)

    async def _reserved(
        self, extent: KVExtent, requests: Sequence[GenerationRequest]
    ) -> Reservation:
        """Take pages, and wait until there are any."""
        while True:
            news = self._slots.news
            try:
                return await self._taken(extent, requests)
            except OverloadedError:
                await news.wait()

    async def _taken(self, extent: KVExtent, requests: Sequence[GenerationRequest]) -> Reservation:
        """Take pages in the engine's turn; a caller that is cancelled takes none."""
        taking = self._thread.submit(self._engine.reserve, requests, extent)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._release_taken)
            raise

    def _release_taken(self, taking: asyncio.Future[Reservation]) -> None:
        """Give back pages that were taken for nobody."""
        if not taking.cancelled() and taking.exception() is None:
            self._releasing(taking.result())

    async def _release(self, reservation: Reservation) -> None:
        # A copy that was queued before still writes to the pages; whoever gets them comes after it.
        await self._copying.submit(lambda: None)
        await self._releasing(reservation)

    def _releasing(self, reservation: Reservation) -> asyncio.Future[None]:
        releasing = self._thread.submit(self._engine.release, reservation)
        releasing.add_done_callback(lambda _: self._slots.tell())
        return releasing

    def _commit(self, incoming: Incoming, known: Known) -> None:
        """Commit on the engine's thread."""
        requests = incoming.reservation.requests
        starts = [
            AnswerStart(r, replay=known[r.request_id]) for r in requests if r.request_id in known
        ]
        self._engine.commit(incoming.reservation, starts)
        for start in starts:
            self._attempts[start.request.request_id] = start.request.attempt

    def _free(self, request_id: str, attempt: int) -> None:
        if self._attempts.get(request_id) == attempt:
            del self._attempts[request_id]
            self._engine.cancel(request_id)


def _load(incoming: Incoming, message: Arrival, envelope: Envelope) -> None:
    incoming.reservation.load(land(message, envelope, incoming.reservation))
    if incoming.keeps:
        incoming.kept.append(land(message, envelope))
