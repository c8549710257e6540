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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayapp.distributed.serve.replicas.engine_loop import EngineLoop, failure_of
from rayapp.engine.prefill import PrefillEngine, PrefillOutput, PrefillRun
from rayapp.engine.request import PromptRequests
from rayapp.engine.scheduler import Chunk
from rayapp.errors import DeadlineError, IntegrityError, OverloadedError, UnavailableError
from rayapp.kv.select import num_prefilled
from rayapp.scaling.meters import PrefillMeter
from rayapp.scaling.reports import PrefillReport

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Ticket:
    """One prompt in the queue; ``run`` is set by its first step.

    ``num_tokens`` are to be computed in all, ``num_running`` of them in the step that runs now.
    """

    prompt: PromptRequests
    num_tokens: int
    done: asyncio.Future[PrefillOutput]
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    run: PrefillRun | None = None
    num_running: int = 0


@dataclass
class _Results:
    """What one step made: the outputs of prompts that ended, and the errors of single prompts."""

    outputs: dict[str, PrefillOutput] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


class PromptQueue:
    """Runs prompts through a prefill engine, shortest first, in steps of bounded size.

    Args:
        engine: The prefill engine; only the loop's thread touches it.
        loop: The loop whose steps run the prompts.
        max_waiting: Prompts that may wait for their first step; further ones are refused.

    Attributes:
        meter: The meter of the engine's steps.
    """

    def __init__(self, engine: PrefillEngine, loop: EngineLoop, *, max_waiting: int) -> None:
        self._engine = engine
        self._loop = loop
        self._max_waiting = max_waiting
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

    async def prefilled(self, prompt: PromptRequests, queue_s: float) -> PrefillOutput:
        """Return the prefilled prompt; a caller that is cancelled takes its prompt out.

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
        ticket = _Ticket(prompt, num_tokens, asyncio.get_running_loop().create_future())
        self._tickets[name] = ticket
        self._loop.scheduler.add(name, num_tokens)
        self.meter.arrive(num_tokens)
        self._loop.wake()
        try:
            await self._first_step(ticket, queue_s)
            return await ticket.done
        finally:
            del self._tickets[name]
            self._loop.scheduler.remove(name)
            ticket.done.cancel()

    def cancel(self, name: str, attempt: int) -> None:
        """End the prefill of this attempt or an earlier one; its caller gets an error."""
        for ticket in self._tickets.values():
            if ticket.prompt.name == name and ticket.prompt.attempt <= attempt:
                self._fail(ticket, UnavailableError(f"request {name} was cancelled"))

    @staticmethod
    def _fail(ticket: _Ticket, error: Exception) -> None:
        if not ticket.done.done():
            ticket.done.set_exception(error)
        ticket.begun.set()

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
            failure = failure_of(error, "prefill")
            results = _Results(errors={chunk.name: failure for chunk in tickets})
        for ticket in tickets.values():
            ticket.num_running = 0
        self._deliver(results)

    def _step(self, tickets: Mapping[Chunk, _Ticket]) -> _Results:
        """Run one step on the engine's thread; a prompt that cannot begin fails alone."""
        results = _Results()
        parts: list[tuple[str, PrefillRun, int]] = []
        for chunk, ticket in tickets.items():
            try:
                ticket.run = ticket.run or self._engine.begin(*ticket.prompt.requests)
            except Exception as error:  # noqa: BLE001 - raised to the one that waits for this prompt
                results.errors[chunk.name] = error
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
        self._loop.scheduler.remove(name)
        ticket = self._tickets.get(name)
        return None if ticket is None or ticket.done.done() else ticket

    def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle; raise if they disagree."""
        counts = {"queued": self.num_waiting, "running": self.num_running}
        num_scheduled = len(self._loop.scheduler)
        if num_scheduled > len(self._tickets):
            raise IntegrityError(f"prefill has {counts} prompts and {num_scheduled} scheduled")
        return {**counts, "queued_tokens": self.num_tokens}
