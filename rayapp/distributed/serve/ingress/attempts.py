"""One attempt at an answer, as the ingress conducts it: prefill, hand over, stream.

Two routes have the same interface: over two replicas, with the KV owned here in between, or within
one replica. Every wait has the deadline of its phase. An attempt that ends early, in whatever phase
and for whatever reason, frees its resources.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from rayapp.distributed.serve.channel import ObjectHandle, ReplicaStream
from rayapp.distributed.serve.ingress.calls import ask_all, call
from rayapp.distributed.serve.ingress.losses import DIED, replica_died
from rayapp.distributed.serve.messages import (
    Address,
    Admission,
    Handover,
    Place,
    PrefillAnswer,
    Refusal,
    Versions,
)
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.channel import KVChannel
from rayapp.engine.request import GenerationRequest, Timeline, TokenBatch
from rayapp.errors import DeadlineError, UnavailableError
from rayapp.kv.ledger import KVShape, Ledger, Route, TransferTimes, account
from rayapp.plan import PruningPlan

_UPDATE_PAUSE_S = 0.2
_MAX_LOST_REPLICAS = 3
# Longest wait of a client's end for a replica to free a slot; the call itself goes on after it.
_FREEING_S = 1.0


@dataclass
class Answering:
    """The state of one request while it is answered, over all its attempts.

    ``sent`` are the tokens that the client has; ``admitted`` is called once decode has a slot for
    it.
    """

    request: GenerationRequest
    timeline: Timeline
    sent: list[int]
    admitted: Callable[[], None]


class Attempts(Protocol):
    """Runs single attempts at an answer."""

    def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Generate the answer's tokens from index 0 or later; sent tokens may be repeated."""
        ...


class DisaggregatedAttempts:
    """Attempts over a prefill and a decode replica.

    Args:
        prefill: Serve's handle of the prefill pool.
        decode: Serve's handle of the decode pool.
        channel: The channel that owns the KV on its way.
        ledger: The ledger that records every transfer.
        plan: The plan under which KV is sent.
        shape: The shape of the model's cache.
        versions: The plan, weights and type that replicas must have.
        deadlines: The deadlines of all phases.
    """

    def __init__(
        self,
        prefill: Any,
        decode: Any,
        *,
        channel: KVChannel,
        ledger: Ledger,
        plan: PruningPlan,
        shape: KVShape,
        versions: Versions,
        deadlines: Deadlines,
    ) -> None:
        self._prefill = prefill.options(stream=True)
        self._decode = decode
        self._tokens = decode.options(stream=True)
        self._channel = channel
        self._ledger = ledger
        self._plan = plan
        self._shape = shape
        self._versions = versions
        self._deadlines = deadlines
        self._freeing: set[asyncio.Future[None]] = set()

    async def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Prefill, hand the KV over while the first token leaves, then stream the rest."""
        async with AsyncExitStack() as resources:
            await self._reserve(resources, answering.request)
            stream, answer = await self._prefilled(answering)
            mark_prefill(answering.timeline, answer)
            if answer.kv_bytes is None:
                if answer.first is not None:
                    yield answer.first
                return
            handover = await resources.enter_async_context(
                self._handing_over(answering, stream, answer)
            )
            if answer.first is not None:
                yield answer.first
            admission = await handover
        mark_admission(answering)
        async with aclosing(self._decoded(answering.request, admission.place)) as batches:
            async for batch in batches:
                yield batch

    async def _reserve(self, resources: AsyncExitStack, request: GenerationRequest) -> None:
        """Wait for room for the request's KV, counted as the dense cache of its prompt."""
        num_bytes = self._shape.dense_bytes(request.num_prompt_tokens)
        async with phase("queue", self._deadlines.queue_s):
            await resources.enter_async_context(self._channel.reserved(num_bytes))

    async def _prefilled(self, answering: Answering) -> tuple[ReplicaStream, PrefillAnswer]:
        """Open a stream; its first item, which says that the prompt is prefilled, is awaited."""
        limits = self._deadlines
        avoid: frozenset[str] = frozenset()
        async with phase("prefill", limits.queue_s + limits.prefill_s):
            while True:
                response = call(
                    self._prefill.prefill,
                    answering.request,
                    self._versions,
                    limits.queue_s,
                    address=Address(avoid=avoid),
                )
                stream = ReplicaStream(response)
                try:
                    answer: PrefillAnswer | Refusal = await stream.first()
                except BaseException:
                    await stream.aclose()
                    raise
                if isinstance(answer, PrefillAnswer):
                    return stream, answer
                avoid |= {answer.place.replica_id}
                await asyncio.sleep(_UPDATE_PAUSE_S)

    @asynccontextmanager
    async def _handing_over(
        self, answering: Answering, stream: ReplicaStream, answer: PrefillAnswer
    ) -> AsyncGenerator[asyncio.Future[Admission], None]:
        """Start the handover and yield its future; leaving the body early undoes the handover."""
        work = self._hand_over(answering, stream, answer, tuple(answering.sent))
        handover = asyncio.ensure_future(work)
        try:
            yield handover
        except BaseException:
            await self._to_the_end(self._abandon(answering.request, stream, handover))
            raise

    async def _abandon(
        self, request: GenerationRequest, stream: ReplicaStream, handover: asyncio.Future[Admission]
    ) -> None:
        """Cancel a handover, or free the slot if it has been admitted."""
        handover.cancel()
        (outcome,) = await asyncio.gather(handover, return_exceptions=True)
        await stream.aclose()
        if isinstance(outcome, Admission):
            await self._free(request, outcome.place)

    async def _hand_over(
        self,
        answering: Answering,
        stream: ReplicaStream,
        answer: PrefillAnswer,
        replay: tuple[int, ...],
    ) -> Admission:
        """Own the KV until a decode replica has copied it; record the transfer in the ledger."""
        request, limit_s = answering.request, self._deadlines.transfer_s
        began_s = time.monotonic()
        async with (
            phase("transfer", limit_s),
            self._channel.received(stream) as handle,
        ):
            put_s = time.monotonic() - began_s
            handover = Handover(
                request.without_image_data, self._versions, answer.first, replay, limit_s
            )
            admission = await self._admitted(handover, handle)
        record = account(
            self._shape,
            self._plan,
            admission.sizes,
            Route(request.request_id, request.attempt, answer.place.node, admission.place.node),
            num_prompt_tokens=request.num_prompt_tokens,
            num_visual_tokens_removed=answer.num_visual_tokens_removed,
            times=TransferTimes(put_s=put_s, fetch_s=admission.fetch_s),
        )
        self._ledger.add(record)
        return admission

    async def _admitted(self, handover: Handover, handle: ObjectHandle) -> Admission:
        """Offer the same KV to decode replicas until one of this version takes it."""
        avoid: frozenset[str] = frozenset()
        num_lost = 0
        while True:
            response = call(self._decode.admit, handover, [handle], address=Address(avoid=avoid))
            try:
                answer: Admission | Refusal = await response
            except asyncio.CancelledError:
                await self._to_the_end(self._withdraw(handover.request, response))
                raise
            except DIED as error:
                num_lost += 1
                if num_lost >= _MAX_LOST_REPLICAS or not replica_died(error):
                    raise
                continue
            if isinstance(answer, Admission):
                return answer
            avoid |= {answer.place.replica_id}
            await asyncio.sleep(_UPDATE_PAUSE_S)

    async def _withdraw(self, request: GenerationRequest, response: Any) -> None:
        """Cancel an admission; it may have succeeded already, and then some replica has a lease."""
        with suppress(*DIED):
            response.cancel()
        await ask_all(
            self._decode,
            "cancel",
            request.request_id,
            request.attempt,
            within_s=self._deadlines.lease_s,
        )

    async def _decoded(
        self, request: GenerationRequest, place: Place
    ) -> AsyncGenerator[TokenBatch, None]:
        """Generate the tokens of an admitted request; leaving early makes decode free its slot."""
        response = call(
            self._tokens.tokens,
            request.request_id,
            request.attempt,
            address=Address(place.replica_id),
        )
        is_final = False
        try:
            async with aclosing(streamed(response, self._deadlines.decode_s)) as batches:
                async for batch in batches:
                    is_final = batch.finish_reason is not None
                    yield batch
        finally:
            if not is_final:
                await self._to_the_end(self._free(request, place))

    async def _free(self, request: GenerationRequest, place: Place) -> None:
        """Tell a decode replica that nobody reads; else it frees the slot only after ``lease_s``.

        Cancelling the stream is not enough: if it never reached the replica, the replica would not
        know.
        """
        response = call(
            self._decode.cancel,
            request.request_id,
            request.attempt,
            address=Address(place.replica_id),
        )
        with suppress(*DIED, TimeoutError):
            async with asyncio.timeout(self._deadlines.lease_s):
                await response

    async def _to_the_end(self, freeing: Coroutine[Any, Any, None]) -> None:
        """Finish freeing resources, even if the caller is cancelled once more in the meantime.

        A client that leaves may cause two cancellations: one by our own watch, and one by Serve.
        A replica on a busy node may answer late: the caller waits for a moment only, and the call
        goes on until the replica would free the slot by itself.
        """
        task = asyncio.ensure_future(freeing)
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)
        done, _ = await asyncio.wait({task}, timeout=_FREEING_S)
        for freed in done:
            freed.result()


class UnifiedAttempts:
    """Attempts within one replica, which runs both stages.

    Args:
        unified: Serve's handle of the pool.
        versions: The plan, weights and type that replicas must have.
        deadlines: The deadlines of all phases.
    """

    def __init__(self, unified: Any, *, versions: Versions, deadlines: Deadlines) -> None:
        self._unified = unified.options(stream=True)
        self._versions = versions
        self._deadlines = deadlines

    async def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Prefill and decode in one streaming call."""
        response, answer = await self._prefilled(answering)
        try:
            async with aclosing(self._rest(answering, answer, response)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            response.cancel()

    async def _prefilled(self, answering: Answering) -> tuple[Any, PrefillAnswer]:
        """Open a stream; its first item, which says that the prompt is prefilled, is awaited."""
        limits = self._deadlines
        avoid: frozenset[str] = frozenset()
        async with phase("prefill", limits.queue_s + limits.prefill_s):
            while True:
                response = call(
                    self._unified.generate,
                    answering.request,
                    self._versions,
                    tuple(answering.sent),
                    address=Address(avoid=avoid),
                )
                try:
                    answer: PrefillAnswer | Refusal = await item_of(response, "prefill")
                except BaseException:
                    response.cancel()
                    raise
                if isinstance(answer, PrefillAnswer):
                    return response, answer
                avoid |= {answer.place.replica_id}
                await asyncio.sleep(_UPDATE_PAUSE_S)

    async def _rest(
        self, answering: Answering, answer: PrefillAnswer, response: Any
    ) -> AsyncGenerator[TokenBatch, None]:
        mark_prefill(answering.timeline, answer)
        if answer.first is not None:
            yield answer.first
        if answer.kv_bytes is None:
            return
        await next_item(response, "transfer", self._deadlines.transfer_s)
        mark_admission(answering)
        async with aclosing(streamed(response, self._deadlines.decode_s)) as batches:
            async for batch in batches:
                yield batch


def mark_prefill(timeline: Timeline, answer: PrefillAnswer) -> None:
    """Mark when prefill began and ended, on this process's clock; later attempts do not count."""
    if timeline.prefill_finished_s is None:
        timeline.prefill_finished_s = time.monotonic()
        timeline.prefill_started_s = timeline.prefill_finished_s - answer.prefill_s


def mark_admission(answering: Answering) -> None:
    """Mark the first admission to decode, and give the waiting place back."""
    answering.timeline.admitted_s = answering.timeline.admitted_s or time.monotonic()
    answering.admitted()


async def streamed(response: Any, limit_s: float) -> AsyncGenerator[TokenBatch, None]:
    """Generate a response's token batches up to the final one; leaving early cancels it."""
    until_s = time.monotonic() + limit_s
    is_final = False
    try:
        while not is_final:
            batch = await next_item(response, "decode", until_s - time.monotonic(), limit_s)
            is_final = batch.finish_reason is not None
            yield batch
    finally:
        if not is_final:
            response.cancel()


async def next_item(response: Any, name: str, within_s: float, limit_s: float | None = None) -> Any:
    """Return the next item of a streaming response, within the phase's deadline."""
    async with phase(name, within_s, limit_s):
        return await item_of(response, name)


async def item_of(response: Any, name: str) -> Any:
    """Return the next item of a streaming response; the caller's phase bounds the wait."""
    try:
        return await anext(response)
    except StopAsyncIteration:
        raise UnavailableError(f"the {name} stream ended too early; prefill again") from None


@asynccontextmanager
async def phase(
    name: str, within_s: float, limit_s: float | None = None
) -> AsyncGenerator[None, None]:
    """Raise :class:`DeadlineError` if the body does not end within ``within_s``."""
    try:
        async with asyncio.timeout(within_s):
            yield
    except TimeoutError:
        raise DeadlineError(
            f"{name} did not end within {limit_s or within_s:.1f} s; what it held was freed: "
            "try again later or raise its deadline"
        ) from None
