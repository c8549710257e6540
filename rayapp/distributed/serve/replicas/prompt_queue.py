"""The prompts of one replica, from their arrival to the end of their prefill, step by step.

A step of the engine runs chunks of several prompts (:class:`rayapp.engine.scheduler.Scheduler`).
Prompts join, leave and are cancelled between steps, so nobody waits for longer than one step to be
considered, and a cancelled prompt costs at most the step that was running.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

from rayapp.distributed.serve.replicas.engine_loop import EngineLoop, failure_of
from rayapp.distributed.serve.replicas.part_sizes import PartSizes
from rayapp.engine.prefill import PrefillEngine, PrefillOutput, PrefillRun
from rayapp.engine.request import PromptRequests
from rayapp.engine.scheduler import Chunk
from rayapp.errors import DeadlineError, IntegrityError, OverloadedError, UnavailableError
from rayapp.kv.segment import KVSegment
from rayapp.kv.select import num_prefilled
from rayapp.scaling.meters import PrefillMeter
from rayapp.scaling.reports import PrefillReport

logger = logging.getLogger(__name__)


Result = KVSegment | PrefillOutput
"""A part of a prompt's KV, or all that is left of it at its end."""


@dataclass(eq=False)
class _Ticket:
    """One prompt in the queue; ``run`` is set by its first step.

    ``num_tokens`` are to be computed in all, ``num_running`` of them in the step that runs now.
    """

    prompt: PromptRequests
    num_tokens: int
    results: asyncio.Queue[Result | Exception] = field(default_factory=asyncio.Queue)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    has_ended: bool = False
    run: PrefillRun | None = None
    num_running: int = 0

    def put(self, result: Result | Exception) -> None:
        """Hand a result to the one who waits; nothing follows an output or an error."""
        if not self.has_ended:
            self.has_ended = not isinstance(result, KVSegment)
            self.results.put_nowait(result)
        self.begun.set()


Results = dict[str, Result | Exception]
"""What one step made, by prompt: parts, outputs of prompts that ended, errors of single prompts."""


class PromptQueue:
    """Runs prompts through a prefill engine, shortest first, in steps of bounded size.

    Args:
        engine: The prefill engine; only the loop's thread touches it.
        loop: The loop whose steps run the prompts.
        max_waiting: Prompts that may wait for their first step; further ones are refused.
        parts: The sizes from which on KV leaves in parts; None sends it whole.

    Attributes:
        meter: The meter of the engine's steps.
    """

    def __init__(
        self,
        engine: PrefillEngine,
        loop: EngineLoop,
        *,
        max_waiting: int,
        parts: PartSizes | None = None,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._max_waiting = max_waiting
        self._parts = parts
        self._tickets: dict[str, _Ticket] = {}
        self._names = map(str, itertools.count())
        self.meter = PrefillMeter(loop.scheduler.max_tokens)
        loop.attach(run_chunks=self._run_chunks)

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
        return self._loop.scheduler.num_tokens

    def report(self, start_s: float) -> PrefillReport:
        """The report of a replica that took ``start_s`` seconds to start."""
        prompts = []
        for name, ticket in self._tickets.items():
            left = self._loop.scheduler.num_left(name) + ticket.num_running
            prompts.append((left, max(0, ticket.num_tokens - left)))
        return self.meter.report(prompts, start_s)

    async def results(self, prompt: PromptRequests, queue_s: float) -> AsyncGenerator[Result, None]:
        """Yield the parts of a prompt's KV that are worth sending alone, then the output.

        A caller that leaves takes its prompt out.

        Args:
            prompt: The prompt to prefill, with the requests for all its answers.
            queue_s: Longest wait for the first step, seconds.

        Raises:
            OverloadedError: Every waiting place is taken.
            DeadlineError: The first step did not begin within ``queue_s``.
            RequestError: A request lies outside the limits.
            UnavailableError: The prompt was cancelled by its key, or its step failed.
        """
        if self.num_waiting >= self._max_waiting:
            raise OverloadedError(
                f"{self.num_waiting} prompts wait for prefill, the limit is {self._max_waiting}; "
                "try again later"
            )
        name = next(self._names)
        num_tokens = max(1, num_prefilled(self._engine.plan, prompt.prompt.num_prompt_tokens))
        ticket = _Ticket(prompt, num_tokens)
        self._tickets[name] = ticket
        self._loop.scheduler.add(name, num_tokens)
        self.meter.arrive(num_tokens)
        self._loop.wake()
        try:
            await self._first_step(ticket, queue_s)
            while True:
                result = await ticket.results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
                if isinstance(result, PrefillOutput):
                    return
        finally:
            del self._tickets[name]
            self._loop.scheduler.remove(name)
            ticket.has_ended = True

    def cancel(self, name: str, attempt: int) -> None:
        """End the prefill of this attempt or an earlier one; its caller gets an error."""
        for ticket in self._tickets.values():
            if ticket.prompt.name == name and ticket.prompt.attempt <= attempt:
                ticket.put(UnavailableError(f"request {name} was cancelled"))

    async def _first_step(self, ticket: _Ticket, queue_s: float) -> None:
        try:
            async with asyncio.timeout(queue_s):
                await ticket.begun.wait()
        except TimeoutError:
            raise DeadlineError(
                f"no turn for prefill within {queue_s:.1f} s; try again later or add replicas"
            ) from None

    async def _run_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Run the chunks of one step, but for prompts that have left since it was planned."""
        planned = {chunk: self._tickets.get(chunk.name) for chunk in chunks}
        tickets = {chunk: ticket for chunk, ticket in planned.items() if ticket is not None}
        for chunk, ticket in tickets.items():
            ticket.begun.set()
            ticket.num_running = chunk.num_tokens
        try:
            results = await self._loop.run(self._step, tickets)
        except Exception as error:
            logger.exception("a prefill step failed")
            results = dict.fromkeys((c.name for c in tickets), failure_of(error, "prefill"))
        for ticket in tickets.values():
            ticket.num_running = 0
        for name, result in results.items():
            self._deliver(name, result)

    def _step(self, tickets: Mapping[Chunk, _Ticket]) -> Results:
        """Run one step on the engine's thread; a prompt that cannot begin fails alone."""
        results: Results = {}
        parts: list[tuple[str, PrefillRun, int]] = []
        for chunk, ticket in tickets.items():
            try:
                ticket.run = ticket.run or self._engine.begin(*ticket.prompt.requests)
            except Exception as error:  # noqa: BLE001 - raised to the one that waits for this prompt
                results[chunk.name] = error
                continue
            # Visual pruning makes a prompt shorter than the scheduler knows.
            left = ticket.run.num_left
            parts.append(
                (chunk.name, ticket.run, left if chunk.is_last else min(left, chunk.num_tokens))
            )
        timed = [(count, run.kv.num_done) for _, run, count in parts]
        began_s = time.perf_counter()
        outputs = iter(self._engine.advance([(run, count) for _, run, count in parts]))
        self.meter.observe(timed, time.perf_counter() - began_s)
        for name, run, _ in parts:
            result = self._cut(run) if run.num_left else next(outputs)
            if result is not None:
                results[name] = result
        return results

    def _cut(self, run: PrefillRun) -> KVSegment | None:
        """The next part of a prompt's KV if it is large enough to be sent alone."""
        if self._parts is None:
            return None
        return self._engine.cut(run, least_bytes=self._parts.least_bytes)

    def _deliver(self, name: str, result: Result | Exception) -> None:
        """Hand a result to the one who waits, if anybody does; a prompt that ended leaves."""
        if not isinstance(result, KVSegment):
            self._loop.scheduler.remove(name)
        ticket = self._tickets.get(name)
        if ticket is not None:
            ticket.put(result)

    def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle; raise if they disagree."""
        counts = {"queued": self.num_waiting, "running": self.num_running}
        num_scheduled = len(self._loop.scheduler)
        if num_scheduled > len(self._tickets):
            raise IntegrityError(f"prefill has {counts} prompts and {num_scheduled} scheduled")
        return {**counts, "queued_tokens": self.num_tokens}
