"""An attempt within one replica, which runs both stages: one streaming call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from rayapp.distributed.serve.ingress.answering import Answering
from rayapp.distributed.serve.ingress.calls import call
from rayapp.distributed.serve.ingress.delivery import Delivery, Inbox
from rayapp.distributed.serve.ingress.freeing import Freeing
from rayapp.distributed.serve.ingress.phases import (
    UPDATE_PAUSE_S,
    end_of,
    item_of,
    next_item,
    phase,
)
from rayapp.distributed.serve.messages import PrefillAnswer, Refusal, Versions
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.request import TokenBatch


class UnifiedAttempts:
    """Attempts within one replica.

    Args:
        unified: Serve's handle of the pool.
        versions: The plan, weights and type that replicas must have.
        deadlines: The deadlines of all phases.
    """

    # An attempt goes to a replica at once.
    waiting_tokens = 0

    def __init__(self, unified: Any, *, versions: Versions, deadlines: Deadlines) -> None:
        self._unified = unified.options(stream=True)
        self._delivery = Delivery(unified)
        self._versions = versions
        self._deadlines = deadlines
        self._freeing = Freeing(unified, within_s=deadlines.lease_s)

    async def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Prefill and decode in one call; leaving early makes the replica free what it holds."""
        with self._delivery.opened(answering.prompt) as inbox:
            response, answer = await self._prefilled(answering)
            is_whole = False
            try:
                async with aclosing(self._rest(answering, answer, response, inbox)) as batches:
                    async for batch in batches:
                        yield batch
                is_whole = True
            finally:
                if not is_whole:
                    response.cancel()
                    await self._freeing.free(answering.prompt, answer.place)

    async def _prefilled(self, answering: Answering) -> tuple[Any, PrefillAnswer]:
        """Open a stream; its first item, which says that the prompt is prefilled, is awaited."""
        limits = self._deadlines
        sent = {name: tuple(tokens) for name, tokens in answering.sent.items()}
        avoid: frozenset[str] = frozenset()
        async with phase("prefill", limits.queue_s + limits.prefill_s):
            while True:
                response = call(
                    self._unified.generate,
                    answering.prompt,
                    self._versions,
                    sent,
                    address=self._delivery.address(avoid=avoid),
                )
                try:
                    answer: PrefillAnswer | Refusal = await item_of(response, "prefill")
                except asyncio.CancelledError:
                    await self._freeing.withdraw(answering.prompt, response)
                    raise
                except BaseException:
                    response.cancel()
                    raise
                if isinstance(answer, PrefillAnswer):
                    return response, answer
                avoid |= {answer.place.replica_id}
                await asyncio.sleep(UPDATE_PAUSE_S)

    async def _rest(
        self, answering: Answering, answer: PrefillAnswer, response: Any, inbox: Inbox
    ) -> AsyncGenerator[TokenBatch, None]:
        answering.mark_prefill(answer)
        for first in answer.firsts:
            yield first
        if answer.kv_bytes is None:
            return
        await next_item(response, "transfer", self._deadlines.transfer_s)
        answering.mark_admission()
        following = self._delivery.listen(inbox, answer.place, end_of(response))
        ended = {first.request_id for first in answer.firsts if first.finish_reason}
        going_on = {r.request_id for r in answering.prompt.requests} - ended
        try:
            async with aclosing(inbox.batches(going_on, self._deadlines.decode_s)) as batches:
                async for batch in batches:
                    yield batch
        except BaseException:
            following.cancel()
            raise
