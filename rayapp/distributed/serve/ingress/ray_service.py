"""The service that the ingress offers over a Ray cluster: admission, attempts, ledger."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from rayapp.api.metrics import ApiMetrics
from rayapp.api.service import Counts, HealthReport, ReplicaHealth, ServiceDescription
from rayapp.distributed.serve import decisions
from rayapp.distributed.serve.ingress.answering import Answering, Attempts
from rayapp.distributed.serve.ingress.calls import ask_all
from rayapp.distributed.serve.ingress.losses import explained, is_lost
from rayapp.distributed.serve.ingress.siblings import Siblings, Tallies
from rayapp.distributed.serve.known_work import wait_s
from rayapp.distributed.serve.messages import Versions
from rayapp.distributed.serve.settings import DECODE
from rayapp.engine.channel import KVChannel
from rayapp.engine.request import GenerationRequest, PromptRequests, Timeline, TokenBatch
from rayapp.errors import (
    IntegrityError,
    OverloadedError,
    PreemptedError,
    RayappError,
    UnavailableError,
)
from rayapp.kv.ledger import Ledger
from rayapp.scaling.admission import Room, refusal
from rayapp.scaling.reports import IngressReport

logger = logging.getLogger(__name__)
_RETRY_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


@dataclass(frozen=True)
class Limits:
    """Limits of one ingress replica.

    Args:
        max_waiting: Requests that may be without a decode slot; further ones are refused.
        max_attempts: Attempts after which a request whose work is lost again and again fails.
        queue_s: Longest wait for a stage; requests that would wait for longer are refused.
    """

    max_waiting: int
    max_attempts: int
    queue_s: float = math.inf


class WaitingRoom:
    """Counts the requests that have no decode slot yet, up to an exact limit."""

    def __init__(self, max_waiting: int, queue_s: float = math.inf) -> None:
        self._room = Room(max_waiting, queue_s)
        self._waiting: set[str] = set()
        self._num_arriving = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    @contextmanager
    def arriving(self, num_answers: int) -> Iterator[None]:
        """Hold places for answers whose prompts are still being read; raise if there are none."""
        self._check(len(self._waiting) + self._num_arriving, num_answers, {})
        self._num_arriving += num_answers
        try:
            yield
        finally:
            self._num_arriving -= num_answers

    def enter(self, request_ids: Collection[str], waits_s: Mapping[str, float]) -> None:
        """Take a place for each; if they are too many, or would wait too long, take none and raise.

        Args:
            request_ids: The requests.
            waits_s: Seconds until a stage begins the last of them, by the name of the stage.
        """
        self._check(len(self._waiting), len(request_ids), waits_s)
        self._waiting.update(request_ids)

    def _check(self, num_waiting: int, num_new: int, waits_s: Mapping[str, float]) -> None:
        refused = refusal(self._room, num_waiting, num_new, waits_s)
        if refused is not None:
            raise OverloadedError(*refused)

    def leave(self, request_ids: Collection[str]) -> None:
        """Give the places back; a second call is harmless."""
        self._waiting.difference_update(request_ids)


class RayService:
    """Implements :class:`rayapp.api.service.Service` with replicas on a cluster.

    Args:
        description: The served model, plan and limits.
        pools: Serve's handles by pool.
        siblings: Serve's handle of the ingress itself, whose other replicas have ledgers too.
        attempts: The conductor of single attempts.
        channel: The channel that owns the KV on its way.
        ledger: The ledger of this ingress replica.
        versions: The plan, weights and type that replicas must have.
        limits: The limits of this ingress replica.
    """

    def __init__(
        self,
        description: ServiceDescription,
        *,
        pools: Mapping[str, Any],
        siblings: Any,
        attempts: Attempts,
        channel: KVChannel,
        ledger: Ledger,
        versions: Versions,
        limits: Limits,
    ) -> None:
        self.name = uuid.uuid4().hex
        self._description = description
        self._pools = pools
        self.metrics = ApiMetrics()
        self._siblings = Siblings(self.name, siblings, ledger, self.metrics.counts)
        self._attempts = attempts
        self._channel = channel
        self._versions = versions
        self._waiting = WaitingRoom(limits.max_waiting, limits.queue_s)
        self._max_attempts = limits.max_attempts
        self._num_answering = self._num_together = 0
        self._is_draining = False
        self._health: asyncio.Task[HealthReport] | None = None
        self.ledger = ledger

    @property
    def description(self) -> ServiceDescription:
        """The served model, plan and limits."""
        return self._description

    async def generate(
        self, requests: Sequence[GenerationRequest], timelines: Sequence[Timeline] = ()
    ) -> AsyncGenerator[TokenBatch, None]:
        """Generate the token batches of all answers; see :class:`rayapp.api.service.Service`."""
        prompt = PromptRequests.of(requests)
        names = [request.request_id for request in requests]
        for request in requests:
            self._description.check(request)
        if names[0] not in self._waiting:
            self._enter([requests])
        self._num_answering += len(names)
        try:
            marks = timelines or [Timeline() for _ in names]
            answering = Answering(
                prompt, dict(zip(names, marks, strict=True)), lambda: self._waiting.leave(names)
            )
            async with aclosing(self._answer(answering)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._num_answering -= len(names)
            self._waiting.leave(names)

    def arriving(self, num_answers: int) -> AbstractContextManager[None]:
        """Hold places for prompts that are read; see :class:`rayapp.api.service.Service`."""
        return self._waiting.arriving(num_answers)

    @contextmanager
    def admitted(self, prompts: Sequence[Sequence[GenerationRequest]]) -> Iterator[None]:
        """Admit several prompts together; see :class:`rayapp.api.service.Service`."""
        self._enter(prompts)
        names = [request.request_id for answers in prompts for request in answers]
        self._num_together += len(names)
        try:
            yield
        finally:
            self._num_together -= len(names)
            self._waiting.leave(names)

    def _enter(self, prompts: Sequence[Sequence[GenerationRequest]]) -> None:
        """Take places for the answers to all prompts, or for none and raise."""
        if self._is_draining:
            raise UnavailableError("this service is about to end; ask again later, or elsewhere")
        before = sum(answers[0].num_prompt_tokens for answers in prompts[:-1])
        waits_s = {pool: wait_s(pool, 0 if pool == DECODE else before) for pool in self._pools}
        names = [request.request_id for answers in prompts for request in answers]
        self._waiting.enter(names, waits_s)

    async def _answer(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Make attempts until all answers are complete; no token leaves twice.

        An attempt that was preempted lost nothing and is not counted.
        """
        num_lost = 0
        for attempt in itertools.count():
            answering.begin(attempt)
            try:
                async with aclosing(self._attempts.run(answering)) as batches:
                    async for batch in batches:
                        new = answering.take(batch)
                        if new is not None:
                            yield new
                if not answering.is_complete:
                    raise UnavailableError("an answer ended without its last token; ask again")
                return
            except Exception as error:
                if answering.is_complete:
                    return
                failure = explained(error)
                if failure is None:
                    raise
                num_lost += not isinstance(failure, PreemptedError)
                self._check_retry(answering, num_lost, failure)
            await asyncio.sleep(min(_RETRY_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))

    def _check_retry(self, answering: Answering, num_lost: int, failure: RayappError) -> None:
        """Return if another attempt may help and is allowed, else raise the error of this one."""
        if not is_lost(failure):
            raise failure from None
        logger.warning("request %s, attempt %d: %s", *answering.prompt.key, failure)
        if num_lost >= self._max_attempts:
            raise UnavailableError(
                f"{self._max_attempts} attempts were lost, the last one because: {failure}"
            ) from None

    async def health(self) -> HealthReport:
        """Report which replicas of every pool answer.

        Everybody may ask for it without a key, so whoever comes while replicas are asked gets the
        same report: strangers make no more than one call at a time.
        """
        if self._health is None or self._health.done():
            # Others wait for it too, so it must not end with the request that came first.
            asking = self._ask_all()
            self._health = asyncio.get_running_loop().create_task(asking, context=Context())
        return await asyncio.shield(self._health)

    async def _ask_all(self) -> HealthReport:
        """Call every replica of every pool."""
        pools = dict(zip(self._pools, await self._describe_all(), strict=True))
        replicas = tuple(replica for members in pools.values() for replica in members)
        missing = [name for name, members in pools.items() if not any(map(self._fits, members))]
        reason = f"no {' and no '.join(missing)} replica answers yet" if missing else ""
        told = await asyncio.to_thread(decisions.read)
        return HealthReport(
            ready=not missing,
            reason=reason,
            replicas=replicas,
            decisions=tuple(decision.text for decision in told),
        )

    async def _describe_all(self) -> list[list[ReplicaHealth]]:
        return await asyncio.gather(*(ask_all(h, "describe") for h in self._pools.values()))

    def _fits(self, replica: ReplicaHealth) -> bool:
        versions = (replica.plan_fingerprint, replica.weights_fingerprint, replica.dtype)
        return Versions(*versions) == self._versions

    async def transfers(self) -> dict[str, Any]:
        """Return the merged ledgers of all ingress replicas."""
        others = await self._siblings.others()
        return Ledger.merge([self.ledger, *(t.ledger for t in others.values())]).as_json()

    async def counted_elsewhere(self) -> list[Counts]:
        """Return what the other ingress replicas have counted."""
        return [tally.counts for tally in (await self._siblings.others()).values()]

    def tallies(self) -> Tallies:
        """Return what this replica has counted, and what it knows of others."""
        return self._siblings.own()

    def drain(self) -> int:
        """Refuse new requests from now on, and return the number of answers under way."""
        self._is_draining = True
        if self.ledger.files is not None:
            self.ledger.files.flush()
        return self._num_answering

    @property
    def report(self) -> IngressReport:
        """The work that waits here, and what the links have carried."""
        sent = self.ledger.totals
        return IngressReport(
            waiting_tokens=self._attempts.waiting_tokens,
            sent=sent.num_transfers,
            sent_s=sent.put_s + sent.fetch_s,
        )

    def counts(self) -> dict[str, int]:
        """Return the numbers of this ingress's resources in use, all zero when idle."""
        counts = {
            "answering": self._num_answering,
            "waiting": len(self._waiting),
            "pinned_bytes": self._channel.pinned_bytes,
        }
        most_waiting = self._num_answering + self._num_together
        if min(counts.values()) < 0 or counts["waiting"] > most_waiting:
            raise IntegrityError(f"the ingress holds {counts}")
        return counts
