"""The prompts of one replica, from their arrival to the end of their prefill, step by step.

A step of the engine runs chunks of several prompts (:class:`rayapp.engine.scheduler.Scheduler`).
Prompts join, leave and are cancelled between steps, so nobody waits for longer than one step to be
considered, and a cancelled prompt costs at most the step that was running.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from rayapp.distributed.serve.replicas.stage import SerialThread
from rayapp.engine.prefill import PrefillEngine, PrefillOutput, PrefillRun
from rayapp.engine.request import GenerationRequest
from rayapp.engine.scheduler import Chunk, Scheduler
from rayapp.errors import DeadlineError, IntegrityError, OverloadedError
from rayapp.kv.select import num_prefilled

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Ticket:
    """One prompt in the queue; ``run`` is set by its first step."""

    request: GenerationRequest
    done: asyncio.Future[PrefillOutput]
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    run: PrefillRun | None = None


@dataclass
class _Results:
    """What one step made: the outputs of prompts that ended, and the errors of single prompts."""

    outputs: dict[str, PrefillOutput] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


class PromptQueue:
    """Runs prompts through a prefill engine, shortest first, in steps of bounded size.

    Args:
        engine: The prefill engine; only ``thread`` touches it.
        thread: The engine's thread, shared with decode if both stages live in one replica.
        max_waiting: Prompts that may wait for their first step; further ones are refused.
        max_num_batched_tokens: Tokens that one step may compute.
    """

    def __init__(
        self,
        engine: PrefillEngine,
        thread: SerialThread,
        *,
        max_waiting: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._engine = engine
        self._thread = thread
        self._max_waiting = max_waiting
        self._scheduler = Scheduler(max_num_batched_tokens)
        self._tickets: dict[str, _Ticket] = {}
        self._names = map(str, itertools.count())
        self._working: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Number of prompts that wait for their first step."""
        return sum(ticket.run is None for ticket in self._tickets.values())

    @property
    def num_running(self) -> int:
        """Number of prompts that have begun and are not complete."""
        return len(self._tickets) - self.num_waiting

    @property
    def num_tokens(self) -> int:
        """Number of tokens that no step has taken yet."""
        return self._scheduler.num_tokens

    async def prefilled(self, request: GenerationRequest, queue_s: float) -> PrefillOutput:
        """Return the prefilled prompt; a caller that is cancelled takes its prompt out.

        Args:
            request: The request to prefill.
            queue_s: Longest wait for the first step, seconds.

        Raises:
            OverloadedError: Every waiting place is taken.
            DeadlineError: The first step did not begin within ``queue_s``.
            RequestError: The request lies outside the limits.
        """
        if self.num_waiting >= self._max_waiting:
            raise OverloadedError(
                f"{self.num_waiting} prompts wait for prefill, the limit is {self._max_waiting}; "
                "try again later"
            )
        name = next(self._names)
        ticket = _Ticket(request, asyncio.get_running_loop().create_future())
        self._tickets[name] = ticket
        self._scheduler.add(
            name, max(1, num_prefilled(self._engine.plan, request.num_prompt_tokens))
        )
        self._start_working()
        try:
            await self._first_step(ticket, queue_s)
            return await ticket.done
        finally:
            del self._tickets[name]
            self._scheduler.remove(name)
            ticket.done.cancel()

    async def _first_step(self, ticket: _Ticket, queue_s: float) -> None:
        try:
            async with asyncio.timeout(queue_s):
                await ticket.begun.wait()
        except TimeoutError:
            raise DeadlineError(
                f"no turn for prefill within {queue_s:.1f} s; try again later or add replicas"
            ) from None

    def _start_working(self) -> None:
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        """Run steps one after the other while there are prompts."""
        while chunks := self._scheduler.next_step():
            tickets = [self._tickets[chunk.name] for chunk in chunks]
            for ticket in tickets:
                ticket.begun.set()
            try:
                results = await self._thread.run(self._step, chunks, tickets)
            except Exception as error:
                logger.exception("a prefill step failed")
                results = _Results(errors={chunk.name: error for chunk in chunks})
            self._deliver(results)

    def _step(self, chunks: Sequence[Chunk], tickets: Sequence[_Ticket]) -> _Results:
        """Run one step on the engine's thread; a prompt that cannot begin fails alone."""
        results = _Results()
        parts: list[tuple[str, PrefillRun, int]] = []
        for chunk, ticket in zip(chunks, tickets, strict=True):
            try:
                ticket.run = ticket.run or self._engine.begin(ticket.request)
            except Exception as error:  # noqa: BLE001 - raised to the one that waits for this prompt
                results.errors[chunk.name] = error
                continue
            # Visual pruning makes a prompt shorter than the scheduler knows.
            left = ticket.run.num_left
            parts.append(
                (chunk.name, ticket.run, left if chunk.is_last else min(left, chunk.num_tokens))
            )
        outputs = iter(self._engine.advance([(run, count) for _, run, count in parts]))
        ended = [name for name, run, _ in parts if not run.num_left]
        results.outputs.update(zip(ended, outputs, strict=True))
        return results

    def _deliver(self, results: _Results) -> None:
        """Hand results to those who still wait for them."""
        for name, output in results.outputs.items():
            ticket = self._leave(name)
            if ticket is not None:
                ticket.done.set_result(output)
        for name, error in results.errors.items():
            ticket = self._leave(name)
            if ticket is not None:
                ticket.done.set_exception(error)

    def _leave(self, name: str) -> _Ticket | None:
        """Take a prompt off the schedule; None if nobody waits for it any more."""
        self._scheduler.remove(name)
        ticket = self._tickets.get(name)
        return None if ticket is None or ticket.done.done() else ticket

    def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle; raise if they disagree."""
        counts = {"queued": self.num_waiting, "running": self.num_running}
        if len(self._scheduler) > len(self._tickets) or (self._scheduler and not self._tickets):
            raise IntegrityError(
                f"prefill has {counts} prompts and {len(self._scheduler)} on its schedule"
            )
        return {**counts, "queued_tokens": self.num_tokens}
