"""Answers get their pages, which are taken in the engine's turn and filled beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.serial_thread import SerialThread
from rayapp.distributed.serve.replicas.slots import Slots
from rayapp.engine.decode import DecodeEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sequences.running import AnswerStart, Reservation
from rayapp.errors import OverloadedError
from rayapp.kv.segment import KVSegment

Known = Mapping[str, tuple[int, ...]]
"""The tokens with which answers begin, by request id."""


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
        left: Sequence[GenerationRequest] = ()
        try:
            reservation = await self._taken(segment, requests, known)
        except OverloadedError:
            requests, left = requests[:1], requests[1:]
            reservation = await self._reserved(segment, requests, known)
        try:
            await self._copying.finish(reservation.load, segment)
            check()
            await self._thread.finish(self._commit, reservation, requests)
        except BaseException:
            self._release(reservation)
            raise
        self._loop.wake()
        return left

    def free(self, request_id: str, attempt: int) -> asyncio.Future[None]:
        """Take this attempt at an answer out, not a later one, in the engine's turn."""
        return self._thread.submit(self._free, request_id, attempt)

    async def _reserved(
        self, segment: KVSegment, requests: Sequence[GenerationRequest], known: Known
    ) -> Reservation:
        """Take pages, and wait until there are any."""
        while True:
            news = self._slots.news
            try:
                return await self._taken(segment, requests, known)
            except OverloadedError:
                await news.wait()

    async def _taken(
        self, segment: KVSegment, requests: Sequence[GenerationRequest], known: Known
    ) -> Reservation:
        """Take pages in the engine's turn; a caller that is cancelled takes none."""
        starts = [AnswerStart(r, replay=known[r.request_id]) for r in requests]
        taking = self._thread.submit(self._engine.reserve, starts, segment)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._release_taken)
            raise

    def _release_taken(self, taking: asyncio.Future[Reservation]) -> None:
        """Give back pages that were taken for nobody."""
        if not taking.cancelled() and taking.exception() is None:
            self._release(taking.result())

    def _release(self, reservation: Reservation) -> None:
        releasing = self._thread.submit(self._engine.release, reservation)
        releasing.add_done_callback(lambda _: self._slots.tell())

    def _commit(self, reservation: Reservation, requests: Sequence[GenerationRequest]) -> None:
        """Let the answers take part in the next step, on the engine's thread."""
        self._engine.commit(reservation)
        for request in requests:
            self._attempts[request.request_id] = request.attempt

    def _free(self, request_id: str, attempt: int) -> None:
        if self._attempts.get(request_id) == attempt:
            del self._attempts[request_id]
            self._engine.cancel(request_id)
