"""The handover of one attempt's KV, from the stream of its prefill to one decode replica.

Before the prefill, a decode replica books room for the answers, and the KV goes there if it can.
KV that comes in parts is handed over part by part while prefill goes on: decode reserves slots and
pages at the first part, copies each as it comes, and begins with the last. All calls are unary, and
a part is let go as soon as decode has copied it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from rayapp.distributed.serve.ingress.calls import call
from rayapp.distributed.serve.ingress.delivery import Delivery
from rayapp.distributed.serve.ingress.freeing import Freeing
from rayapp.distributed.serve.ingress.losses import DIED, replica_died
from rayapp.distributed.serve.ingress.phases import UPDATE_PAUSE_S, phase
from rayapp.distributed.serve.messages import (
    Address,
    Admission,
    Copied,
    Handover,
    KVPart,
    Place,
    PrefillAnswer,
    Refusal,
    Seat,
    Seating,
    Versions,
)
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.channel import KVChannel, MessageStream
from rayapp.engine.request import PromptRequests
from rayapp.kv.ledger import TransferTimes

_MAX_LOST_REPLICAS = 3


@dataclass(frozen=True)
class Delivered:
    """KV that a decode replica has taken over: where it is, and what the way cost."""

    place: Place
    copied: Copied
    times: TransferTimes
    num_messages: int


class HandingOver:
    """Hands the KV of one attempt over.

    Args:
        decode: Serve's handle of the decode pool.
        delivery: What receives the tokens of the answers.
        channel: The channel that owns messages on their way.
        freeing: The word to decode that nobody reads an attempt's answers.
        prompt: The requests for all answers, with their attempt.
        versions: The plan, weights and type that decode must have.
        deadlines: The deadlines of all phases.
    """

    def __init__(
        self,
        decode: Any,
        delivery: Delivery,
        channel: KVChannel,
        freeing: Freeing,
        prompt: PromptRequests,
        versions: Versions,
        deadlines: Deadlines,
    ) -> None:
        self._decode = decode
        self._delivery = delivery
        self._channel = channel
        self._freeing = freeing
        self._prompt = prompt.without_image_data
        self._versions = versions
        self._limits = deadlines
        self._parts: asyncio.Queue[tuple[KVPart, Any] | None] = asyncio.Queue()
        self._sending: asyncio.Future[Seat] | None = None
        self._ending: asyncio.Future[Delivered] | None = None
        self._has_asked = False
        self._booked: Place | None = None
        self._place: Place | None = None
        self._copied: list[Copied] = []
        self._num_parts = 0
        self._pack_s = 0.0

    @asynccontextmanager
    async def undone_unless_whole(self) -> AsyncGenerator[HandingOver, None]:
        """Undo the handover where the body ends before decode has taken all KV over."""
        is_whole = False
        try:
            yield self
            is_whole = self._ending is not None and self._ending.done()
        finally:
            if not is_whole:
                # A client that leaves may cause two cancellations; this must outlive both.
                await self._freeing.to_the_end(self._undo())

    async def book(self) -> None:
        """Have a decode replica promise room for the answers, which the KV is then handed to.

        The caller's phase bounds the wait.
        """
        self._has_asked = True
        limit_s = self._limits.queue_s
        seat: Seat = await self._offered(self._decode.book, self._prompt, self._versions, limit_s)
        self._booked = seat.place

    async def follow(self, stream: MessageStream, item: KVPart | PrefillAnswer) -> PrefillAnswer:
        """Hand over all parts that come before the answer; return the answer.

        Args:
            stream: The stream of the prefill.
            item: Its first item.
        """
        while isinstance(item, KVPart):
            handle = await self._channel.part(stream)
            self._parts.put_nowait((item, handle))
            self._num_parts += 1
            self._pack_s += item.pack_s
            if self._sending is None:
                self._sending = asyncio.ensure_future(self._send_parts(item))
            elif self._sending.done():
                self._sending.result()  # It ends before the last part only if it fails.
            item = await stream.item()
        return item

    def end(
        self, handover: Handover, stream: MessageStream, answer: PrefillAnswer
    ) -> asyncio.Future[Delivered]:
        """Start handing over the last message, or the only one."""
        handover = replace(handover, part=self._num_parts)
        self._ending = asyncio.ensure_future(self._end(handover, stream, answer))
        return self._ending

    async def _end(
        self, handover: Handover, stream: MessageStream, answer: PrefillAnswer
    ) -> Delivered:
        began_s = time.monotonic()
        async with (
            phase("transfer", handover.wait_s),
            self._channel.received(stream) as handle,
        ):
            put_s = self._pack_s + time.monotonic() - began_s
            admission = await self._admitted(handover, handle)
        copied = sum(self._copied, start=admission.copied)
        # What was not waited for after the prefill was hidden behind it.
        work_s, waited_s = put_s + copied.fetch_s + copied.copy_s, time.monotonic() - began_s
        times = TransferTimes(
            queue_s=answer.queue_s,
            prefill_s=answer.prefill_s,
            put_s=put_s,
            fetch_s=copied.fetch_s,
            copy_s=copied.copy_s,
            hidden_s=max(0.0, work_s - waited_s),
        )
        return Delivered(admission.place, copied, times, self._num_parts + 1)

    async def _admitted(self, handover: Handover, handle: Any) -> Admission:
        """Let decode begin: the replica that has the other parts, or any if this is all."""
        if self._sending is None:
            found: Admission = await self._offered(self._decode.admit, handover, [handle])
            return found
        self._parts.put_nowait(None)
        seat = await self._sending
        here = Address(seat.place.replica_id)
        admission: Admission = await self._called(
            self._decode.admit, handover, [handle], address=here
        )
        return admission

    async def _send_parts(self, first: KVPart) -> Seat:
        """Reserve a place in decode, then send part after part, to the end of them."""
        limits = self._limits
        wait_s = limits.prefill_s + limits.transfer_s
        seating = Seating(self._prompt, self._versions, first.extent, wait_s)
        seat: Seat = await self._offered(self._decode.reserve, seating)
        self._place = seat.place
        while (sent := await self._parts.get()) is not None:
            part, handle = sent
            try:
                copied = await self._called(
                    self._decode.load,
                    *self._prompt.key,
                    part.part,
                    [handle],
                    address=Address(seat.place.replica_id),
                )
            finally:
                self._channel.release(handle)
            self._copied.append(copied)
        return seat

    async def _offered(self, method: Any, *arguments: Any) -> Any:
        """Ask decode replicas until one of this version takes the offer, the booked one first."""
        preferred = None if self._booked is None else self._booked.replica_id
        avoid: frozenset[str] = frozenset()
        num_lost = 0
        while True:
            address = self._delivery.address(avoid=avoid, preferred=preferred)
            try:
                answer = await self._called(method, *arguments, address=address)
            except DIED as error:
                num_lost += 1
                if num_lost >= _MAX_LOST_REPLICAS or not replica_died(error):
                    raise
                preferred = None
                continue
            if not isinstance(answer, Refusal):
                return answer
            avoid |= {answer.place.replica_id}
            await asyncio.sleep(UPDATE_PAUSE_S)

    @staticmethod
    async def _called(method: Any, *arguments: Any, address: Address) -> Any:
        """The answer to a call, which is cancelled when nobody awaits it any more."""
        response = call(method, *arguments, address=address)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def _undo(self) -> None:
        """Cancel what is under way, let messages go, and free what decode holds."""
        running = [task for task in (self._ending, self._sending) if task is not None]
        for task in running:
            task.cancel()
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        while not self._parts.empty():
            sent = self._parts.get_nowait()
            if sent is not None:
                self._channel.release(sent[1])
        taken = [outcome for outcome in outcomes if isinstance(outcome, Delivered)]
        place = taken[0].place if taken else self._place
        if not running:
            place = self._booked
        if place is not None:
            await self._freeing.free(self._prompt, place)
        elif running or self._has_asked:  # A replica may hold room whose promise never came.
            await self._freeing.withdraw(self._prompt)
