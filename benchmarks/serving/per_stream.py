"""Delivery as it was: a streaming call for every attempt, an item per step for every stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from rayapp.distributed.serve.ingress.answering import Answering
from rayapp.distributed.serve.ingress.calls import call
from rayapp.distributed.serve.ingress.phases import next_item
from rayapp.distributed.serve.messages import Versions
from rayapp.engine.request import TokenBatch

_LIMIT_S = 600.0


class PerStreamAttempts:
    """Attempts whose tokens come by a call of their own.

    Args:
        pool: Serve's handle of a pool of :class:`serving.stand_in.StandIn`.
        versions: The versions that replicas are asked for.
    """

    waiting_tokens = 0

    def __init__(self, pool: Any, versions: Versions) -> None:
        self._pool = pool.options(stream=True)
        self._versions = versions

    async def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        response = call(self._pool.stream, answering.prompt, self._versions)
        answer = await next_item(response, "prefill", _LIMIT_S)
        answering.mark_prefill(answer)
        for first in answer.firsts:
            yield first
        answering.mark_admission()
        unfinished = {request.request_id for request in answering.prompt.requests}
        while unfinished:
            for batch in await next_item(response, "decode", _LIMIT_S):
                if batch.finish_reason is not None:
                    unfinished.discard(batch.request_id)
                yield batch
