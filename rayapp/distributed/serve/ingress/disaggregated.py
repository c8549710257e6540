"""An attempt over two replicas, as the ingress conducts it: prefill, hand over, stream.

The KV in between is owned here. An attempt that ends early, in whatever phase and for whatever
reason, frees its resources.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict
from typing import Any

from rayapp.distributed.serve.channel import ReplicaStream
from rayapp.distributed.serve.ingress.answering import Answering
from rayapp.distributed.serve.ingress.calls import call
from rayapp.distributed.serve.ingress.delivery import Delivery, Inbox
from rayapp.distributed.serve.ingress.freeing import Freeing
from rayapp.distributed.serve.ingress.handing_over import Delivered, HandingOver
from rayapp.distributed.serve.ingress.origins import Origin, Origins
from rayapp.distributed.serve.ingress.phases import UPDATE_PAUSE_S, phase
from rayapp.distributed.serve.known_work import wait_s
from rayapp.distributed.serve.messages import (
    Address,
    Handover,
    KVPart,
    Place,
    PrefillAnswer,
    Refusal,
    Versions,
)
from rayapp.distributed.serve.settings import DECODE, ServiceSettings
from rayapp.engine.channel import KVChannel
from rayapp.engine.request import PromptRequests, TokenBatch
from rayapp.kv.ledger import KVShape, Ledger, Route, account, payload_bytes
from rayapp.plan import PruningPlan
from rayapp.scaling.fitting import LinearFit

_USUAL_BYTES = 1e7


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
        settings: The settings of the service: its deadlines, and whether nodes count their KV.
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
        settings: ServiceSettings,
    ) -> None:
        deadlines = settings.deadlines
        counts = settings.max_node_kv_bytes is not None
        self._prefill = prefill.options(stream=True)
        self._decode = decode
        self._channel = channel
        self._ledger = ledger
        self._plan = plan
        self._shape = shape
        self._pace = LinearFit((1.0, _USUAL_BYTES))
        self._versions = versions
        self._deadlines = deadlines
        self._unsent_tokens = self._unbooked_tokens = 0
        self._freeing = Freeing(decode, within_s=deadlines.lease_s)
        self._origins = Origins(prefill, within_s=deadlines.lease_s, counts=counts)
        self._delivery = Delivery(decode)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that wait for prefill here; those that wait for decode are its own work."""
        return self._unsent_tokens + (0 if wait_s(DECODE) else self._unbooked_tokens)

    async def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Book room, prefill, hand the KV over meanwhile, let first tokens leave, then stream."""
        with self._delivery.opened(answering.prompt) as inbox:
            async with AsyncExitStack() as resources:
                handing = await self._begun(resources, answering.prompt)
                origin = await resources.enter_async_context(self._origins.of(answering.prompt))
                stream, answer = await self._prefilled(resources, answering.prompt, handing, origin)
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
                ending = handing.end(handover, stream, answer)
                for first in answer.firsts:
                    yield first
                delivered = await ending
                self._record(answering, answer, delivered)
            answering.mark_admission()
            async with aclosing(self._decoded(handover.prompt, delivered.place, inbox)) as batches:
                async for batch in batches:
                    yield batch

    def _handing_over(self, prompt: PromptRequests) -> HandingOver:
        return HandingOver(
            self._decode,
            self._delivery,
            self._channel,
            self._freeing,
            prompt,
            self._versions,
            self._deadlines,
        )

    async def _begun(self, resources: AsyncExitStack, prompt: PromptRequests) -> HandingOver:
        """Begin a handover: wait for room for the prompt's KV on its way, and then in decode.

        KV on its way is counted as what the plan sends of it at most.
        """
        num_tokens = prompt.prompt.num_prompt_tokens
        num_bytes = payload_bytes(self._shape, self._plan, num_tokens)
        async with phase("queue", self._deadlines.queue_s):
            self._unsent_tokens += num_tokens
            try:
                await resources.enter_async_context(self._channel.reserved(num_bytes))
            finally:
                self._unsent_tokens -= num_tokens
            handing = self._handing_over(prompt)
            await resources.enter_async_context(handing.undone_unless_whole())
            if prompt.needs_decode(self._plan.first_token):
                self._unbooked_tokens += num_tokens
                try:
                    await handing.book()
                finally:
                    self._unbooked_tokens -= num_tokens
        return handing

    async def _prefilled(
        self,
        resources: AsyncExitStack,
        prompt: PromptRequests,
        handing: HandingOver,
        origin: Origin,
    ) -> tuple[ReplicaStream, PrefillAnswer]:
        """Prefill on a replica of this version, handing KV over that comes before the end."""
        limits = self._deadlines
        avoid: frozenset[str] = frozenset()
        async with phase("prefill", limits.queue_s + limits.prefill_s):
            while True:
                response = call(
                    self._prefill.prefill,
                    prompt,
                    self._versions,
                    limits.queue_s,
                    self._pace.coefficients[1],
                    address=self._delivery.address(avoid=avoid),
                )
                stream = ReplicaStream(response)
                resources.push_async_exit(_closing(stream))
                item: KVPart | PrefillAnswer | Refusal = await stream.item()
                if not isinstance(item, Refusal):
                    origin.node = item.place.node
                    return stream, await handing.follow(stream, item)
                avoid |= {item.place.replica_id}
                await asyncio.sleep(UPDATE_PAUSE_S)

    def _record(self, answering: Answering, answer: PrefillAnswer, delivered: Delivered) -> None:
        """Enter the transfer in the ledger, and in the timelines of its answers."""
        prompt = answering.prompt
        record = account(
            self._shape,
            self._plan,
            delivered.copied.sizes,
            Route(*prompt.key, answer.place.node, delivered.place.node),
            num_prompt_tokens=prompt.prompt.num_prompt_tokens,
            num_visual_tokens_removed=answer.num_visual_tokens_removed,
            times=delivered.times,
        )
        self._ledger.add(record)
        # Bytes before they were encoded, so that replicas know them before they encode.
        num_bytes = record.bytes_sent - record.overhead_bytes + record.saved_by_encoding_bytes
        seconds = record.put_s + record.fetch_s + record.copy_s
        self._pace.observe((delivered.num_messages, num_bytes), seconds)
        for request in prompt.requests:
            answering.timelines[request.request_id].transfer = asdict(record)

    async def _decoded(
        self, prompt: PromptRequests, place: Place, inbox: Inbox
    ) -> AsyncGenerator[TokenBatch, None]:
        """Generate the tokens of admitted answers; leaving early makes decode free their slots."""
        response = call(self._decode.follow, *prompt.key, address=Address(place.replica_id))
        following = self._delivery.listen(inbox, place, response)
        names = [request.request_id for request in prompt.requests]
        is_whole = False
        try:
            async with aclosing(inbox.batches(names, self._deadlines.decode_s)) as batches:
                async for batch in batches:
                    yield batch
            is_whole = True
        finally:
            if not is_whole:
                following.cancel()
                response.cancel()
                await self._freeing.free(prompt, place)


def _closing(stream: ReplicaStream) -> Callable[..., Awaitable[None]]:
    """What to do with a stream when its attempt ends: an attempt that failed cancels it."""

    async def close(error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            await stream.aclose()

    return close
