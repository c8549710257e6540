"""An attempt over two replicas, as the ingress conducts it: prefill, hand over, stream.

The KV in between is owned here. An attempt that ends early, in whatever phase and for whatever
reason, frees its resources.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

from rayapp.distributed.serve.channel import ObjectHandle, ReplicaStream
from rayapp.distributed.serve.ingress.answering import Answering
from rayapp.distributed.serve.ingress.calls import call
from rayapp.distributed.serve.ingress.freeing import Freeing
from rayapp.distributed.serve.ingress.losses import DIED, replica_died
from rayapp.distributed.serve.ingress.phases import UPDATE_PAUSE_S, phase, streamed
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
from rayapp.engine.request import PromptRequests, TokenBatch
from rayapp.kv.ledger import KVShape, Ledger, Route, TransferTimes, account
from rayapp.plan import PruningPlan

_MAX_LOST_REPLICAS = 3


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
        self.waiting_tokens = 0
        self._freeing = Freeing(decode, within_s=deadlines.lease_s)

    async def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Prefill, hand the KV over while the first tokens leave, then stream the rest."""
        async with AsyncExitStack() as resources:
            await self._reserve(resources, answering.prompt)
            stream, answer = await self._prefilled(answering.prompt)
            answering.mark_prefill(answer)
            if answer.kv_bytes is None:
                for first in answer.firsts:
                    yield first
                return
            handover = Handover.after(
                answering.prompt,
                self._versions,
                answer.firsts,
                answering.sent,
                self._deadlines.transfer_s,
            )
            admitting = await resources.enter_async_context(
                self._handing_over(handover, stream, answer)
            )
            for first in answer.firsts:
                yield first
            admission = await admitting
        answering.mark_admission()
        async with aclosing(self._decoded(handover.prompt, admission.place)) as batches:
            async for batch in batches:
                yield batch

    async def _reserve(self, resources: AsyncExitStack, prompt: PromptRequests) -> None:
        """Wait for room for the prompt's KV, counted as the dense cache of the prompt."""
        num_tokens = prompt.prompt.num_prompt_tokens
        self.waiting_tokens += num_tokens
        try:
            async with phase("queue", self._deadlines.queue_s):
                num_bytes = self._shape.dense_bytes(num_tokens)
                await resources.enter_async_context(self._channel.reserved(num_bytes))
        finally:
            self.waiting_tokens -= num_tokens

    async def _prefilled(self, prompt: PromptRequests) -> tuple[ReplicaStream, PrefillAnswer]:
        """Open a stream; its first item, which says that the prompt is prefilled, is awaited."""
        limits = self._deadlines
        avoid: frozenset[str] = frozenset()
        async with phase("prefill", limits.queue_s + limits.prefill_s):
            while True:
                response = call(
                    self._prefill.prefill,
                    prompt,
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
                await asyncio.sleep(UPDATE_PAUSE_S)

    @asynccontextmanager
    async def _handing_over(
        self, handover: Handover, stream: ReplicaStream, answer: PrefillAnswer
    ) -> AsyncGenerator[asyncio.Future[Admission], None]:
        """Start the handover and yield its future; leaving the body early undoes the handover."""
        admitting = asyncio.ensure_future(self._hand_over(handover, stream, answer))
        try:
            yield admitting
        except BaseException:
            await self._abandon(handover.prompt, stream, admitting)
            raise

    async def _abandon(
        self, prompt: PromptRequests, stream: ReplicaStream, admitting: asyncio.Future[Admission]
    ) -> None:
        """Cancel a handover, or free the slots if it has been admitted."""
        admitting.cancel()
        (outcome,) = await asyncio.gather(admitting, return_exceptions=True)
        await stream.aclose()
        if isinstance(outcome, Admission):
            await self._freeing.free(prompt, outcome.place)

    async def _hand_over(
        self, handover: Handover, stream: ReplicaStream, answer: PrefillAnswer
    ) -> Admission:
        """Own the KV until a decode replica has copied it; record the transfer in the ledger."""
        began_s = time.monotonic()
        async with (
            phase("transfer", handover.wait_s),
            self._channel.received(stream) as handle,
        ):
            put_s = time.monotonic() - began_s
            admission = await self._admitted(handover, handle)
        record = account(
            self._shape,
            self._plan,
            admission.sizes,
            Route(*handover.prompt.key, answer.place.node, admission.place.node),
            num_prompt_tokens=handover.prompt.prompt.num_prompt_tokens,
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
                await self._freeing.withdraw(handover.prompt, response)
                raise
            except DIED as error:
                num_lost += 1
                if num_lost >= _MAX_LOST_REPLICAS or not replica_died(error):
                    raise
                continue
            if isinstance(answer, Admission):
                return answer
            avoid |= {answer.place.replica_id}
            await asyncio.sleep(UPDATE_PAUSE_S)

    async def _decoded(
        self, prompt: PromptRequests, place: Place
    ) -> AsyncGenerator[TokenBatch, None]:
        """Generate the tokens of admitted answers; leaving early makes decode free their slots."""
        response = call(self._tokens.tokens, *prompt.key, address=Address(place.replica_id))
        is_whole = False
        try:
            async with aclosing(
                streamed(response, prompt.requests, self._deadlines.decode_s)
            ) as batches:
                async for batch in batches:
                    yield batch
            is_whole = True
        finally:
            if not is_whole:
                await self._freeing.free(prompt, place)
