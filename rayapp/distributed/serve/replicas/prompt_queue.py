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
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rayapp.distributed.serve.replicas.engine_loop import EngineLoop, failure_of
from rayapp.distributed.serve.replicas.part_sizes import PartSizes, PassProgress
from rayapp.engine.prefill import PrefillEngine, PrefillOutput, PrefillRun
from rayapp.engine.request import PromptRequests
from rayapp.engine.scheduler import Chunk
from rayapp.errors import DeadlineError, IntegrityError, OverloadedError, UnavailableError
from rayapp.kv.parts import Part
from rayapp.kv.select import num_prefilled
from rayapp.scaling.meters import PrefillMeter
from rayapp.scaling.reports import PrefillReport

logger = logging.getLogger(__name__)


Result = Part | PrefillOutput
"""A part of a prompt's KV, or all that is left of it at its end."""

Outcome = PrefillOutput | Exception
"""The end of a prompt's prefill."""


@dataclass(eq=False)
class _Ticket:
    """One prompt in the queue; ``run`` is set by its first step, ``outcome`` by its last.

    ``num_tokens`` are to be computed in all, ``num_running`` of them in the step that runs now.
    Steps may take it once it ``is_scheduled``, for which it may have to wait for room. ``changed``
    is set when the prompt ends, and when more of its KV is known.
    """

    prompt: PromptRequests
    num_tokens: int
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Outcome | None = None
    run: PrefillRun | None = None
    num_running: int = 0
    is_scheduled: bool = False

    def end(self, outcome: Outcome) -> None:
        """Tell the one who waits how it ended; only the first outcome counts."""
        self.outcome = self.outcome or outcome
        self.changed.set()
        self.begun.set()


@dataclass(frozen=True, eq=False)
class PromptStep:
    """A step of the queue: its prompts, and how far its pass has come.

    Args:
        tickets: The prompts, by their chunks.
        progress: What notes how far the pass has come.
        tell: Makes the event loop call a function.
    """

    tickets: Mapping[Chunk, _Ticket]
    progress: PassProgress
    tell: Callable[..., object]

    def failed(self, error: Exception) -> dict[str, Outcome]:
        """The outcomes of a step that raised."""
        return dict.fromkeys((chunk.name for chunk in self.tickets), failure_of(error, "prefill"))


Advance = Callable[
    [Sequence[tuple[PrefillRun, int]], Callable[[], None] | None], tuple[list[PrefillOutput], float]
]
"""Runs chunks, as :meth:`PrefillEngine.advance` does; returns its outputs and seconds."""


class PromptQueue:
    """Runs prompts through a prefill engine, shortest first, in steps of bounded size.

    While a pass runs, the engine notes that blocks have written their KV. Whether that makes a part
    worth sending is decided beside it, by the one who waits for the prompt.

    Args:
        engine: The prefill engine; only the loop's thread touches it.
        loop: The loop whose steps run the prompts.
        max_waiting: Prompts that may wait for their first step; further ones are refused.
        parts: The rule by which KV leaves in parts; None sends it whole.

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
        self._progress = PassProgress(0, 0)
        self._tickets: dict[str, _Ticket] = {}
        self._names = map(str, itertools.count())
        self.meter = PrefillMeter(loop.scheduler.max_tokens)
        loop.attach(run_chunks=self.run_chunks)

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
        waiting = sum(t.num_tokens for t in self._tickets.values() if not t.is_scheduled)
        return self._loop.scheduler.num_tokens + waiting

    def report(self, start_s: float) -> PrefillReport:
        """The report of a replica that took ``start_s`` seconds to start."""
        prompts = []
        for name, ticket in self._tickets.items():
            left = self._loop.scheduler.num_left(name) + ticket.num_running
            if not ticket.is_scheduled:
                left = ticket.num_tokens
            prompts.append((left, max(0, ticket.num_tokens - left)))
        return self.meter.report(prompts, start_s)

    async def results(
        self,
        prompt: PromptRequests,
        queue_s: float,
        room: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[Result, None]:
        """Yield the parts of a prompt's KV that are worth sending alone, then the output.

        A caller that leaves takes its prompt out.

        Args:
            prompt: The prompt to prefill, with the requests for all its answers.
            queue_s: Longest wait for the first step, seconds.
            room: Awaited before the first step, while the prompt counts as waiting.

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
        self.meter.arrive(num_tokens)
        entering = None
        if room is None:
            self._schedule(name, ticket)
        else:
            entering = asyncio.ensure_future(self._enter(name, ticket, room))
        try:
            await self._first_step(ticket, queue_s)
            while ticket.outcome is None:
                await ticket.changed.wait()
                ticket.changed.clear()
                part = self._cut(name, ticket)
                if part is not None:
                    yield part
            if isinstance(ticket.outcome, Exception):
                raise ticket.outcome
            yield ticket.outcome
        finally:
            if entering is not None:
                entering.cancel()
            del self._tickets[name]
            self._loop.scheduler.remove(name)
            ticket.outcome = ticket.outcome or UnavailableError("the caller has left")

    def _schedule(self, name: str, ticket: _Ticket) -> None:
        """Let steps take a prompt from now on."""
        ticket.is_scheduled = True
        self._loop.scheduler.add(name, ticket.num_tokens)
        self._loop.wake()

    async def _enter(self, name: str, ticket: _Ticket, room: Callable[[], Awaitable[None]]) -> None:
        """Schedule a prompt once there is room for it; without room it ends."""
        try:
            await room()
        except Exception as error:  # noqa: BLE001 - raised to the one that waits for this prompt
            ticket.end(error)
        else:
            self._schedule(name, ticket)

    def cancel(self, name: str, attempt: int) -> None:
        """End the prefill of this attempt or an earlier one; its caller gets an error."""
        for ticket in self._tickets.values():
            if ticket.prompt.name == name and ticket.prompt.attempt <= attempt:
                ticket.end(UnavailableError(f"request {name} was cancelled"))

    async def _first_step(self, ticket: _Ticket, queue_s: float) -> None:
        try:
            async with asyncio.timeout(queue_s):
                await ticket.begun.wait()
        except TimeoutError:
            raise DeadlineError(
                f"no turn for prefill within {queue_s:.1f} s; try again later or add replicas"
            ) from None

    async def run_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Compute chunks of prompts and deliver what ends; an error ends these prompts."""
        step = self.planned(chunks)
        try:
            outcomes = await self._loop.run(self.compute, step)
        except Exception as error:
            logger.exception("a prefill step failed")
            outcomes = step.failed(error)
        self.settle(step, outcomes)

    def planned(self, chunks: Sequence[Chunk]) -> PromptStep:
        """Begin a step with these chunks, but for prompts that have left since it was planned."""
        planned = {chunk: self._tickets.get(chunk.name) for chunk in chunks}
        tickets = {chunk: ticket for chunk, ticket in planned.items() if ticket is not None}
        for chunk, ticket in tickets.items():
            ticket.begun.set()
            ticket.num_running = chunk.num_tokens
        num_tokens = sum(chunk.num_tokens for chunk in tickets)
        self._progress = PassProgress(num_tokens, self._engine.num_writing)
        tell = asyncio.get_running_loop().call_soon_threadsafe
        return PromptStep(tickets, self._progress, tell)

    def settle(self, step: PromptStep, outcomes: Mapping[str, Outcome]) -> None:
        """Take note of a step that has ended, and tell those who wait for its prompts."""
        for ticket in step.tickets.values():
            ticket.num_running = 0
            ticket.changed.set()
        for name, outcome in outcomes.items():
            self._deliver(name, outcome)

    def compute(self, step: PromptStep, advance: Advance | None = None) -> dict[str, Outcome]:
        """Run a step on the engine's thread; a prompt that cannot begin fails alone.

        Args:
            step: The step.
            advance: What runs the chunks, and the seconds that count as theirs; by default
                the engine, and all of them.

        Returns:
            Outputs of prompts that ended, and errors of single prompts, by name.
        """
        advance = advance or self._advance
        progress, tell = step.progress, step.tell
        outcomes: dict[str, Outcome] = {}
        chunks: list[tuple[str, PrefillRun, int]] = []
        for chunk, ticket in step.tickets.items():
            try:
                run = ticket.run or self._begin(ticket)
            except Exception as error:  # noqa: BLE001 - raised to the one that waits for this prompt
                outcomes[chunk.name] = error
                continue
            # Visual pruning makes a prompt shorter than the scheduler knows.
            count = run.num_left if chunk.is_last else min(run.num_left, chunk.num_tokens)
            chunks.append((chunk.name, run, count))
        told = [t.changed for t in step.tickets.values() if self._may_leave(t)]

        def noted() -> None:
            progress.note()
            tell(_set_all, told)

        timed = [(count, run.kv.num_done) for _, run, count in chunks]
        progress.begin()
        outputs, seconds = advance(
            [(run, count) for _, run, count in chunks], noted if told else None
        )
        progress.end()
        self.meter.observe(timed, seconds)
        ended = [name for name, run, _ in chunks if not run.num_left]
        return {**outcomes, **dict(zip(ended, outputs, strict=True))}

    def _advance(
        self, chunks: Sequence[tuple[PrefillRun, int]], noted: Callable[[], None] | None
    ) -> tuple[list[PrefillOutput], float]:
        began_s = time.perf_counter()
        noting = {} if noted is None else {"noted": noted}
        outputs = self._engine.advance(chunks, **noting)
        return outputs, time.perf_counter() - began_s

    def _begin(self, ticket: _Ticket) -> PrefillRun:
        in_parts = self._parts is not None
        ticket.run = self._engine.begin(*ticket.prompt.requests, in_parts=in_parts)
        return ticket.run

    def _may_leave(self, ticket: _Ticket) -> bool:
        """Whether a prompt has more KV than makes a part worth sending."""
        if self._parts is None or ticket.run is None:
            return False
        num_bytes = ticket.run.num_parts_bytes
        return num_bytes > self._parts.least_bytes(num_bytes)

    def _cut(self, name: str, ticket: _Ticket) -> Part | None:
        """The next part of a prompt's KV, if it is large enough and in time to be sent alone."""
        if self._parts is None or ticket.run is None or ticket.outcome is not None:
            return None
        left_s = self._loop.scheduler.num_left(name) * self._progress.token_s
        if ticket.num_running:
            left_s += self._progress.left_s
        if not self._parts.is_in_time(left_s):
            return None
        least_bytes = self._parts.least_bytes(ticket.run.num_parts_bytes)
        return ticket.run.cut(least_bytes=least_bytes)

    def _deliver(self, name: str, outcome: Outcome) -> None:
        """Tell the one who waits, if anybody does, how a prompt ended; it leaves."""
        self._loop.scheduler.remove(name)
        ticket = self._tickets.get(name)
        if ticket is not None:
            ticket.end(outcome)

    def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle; raise if they disagree."""
        counts = {"queued": self.num_waiting, "running": self.num_running}
        num_scheduled = len(self._loop.scheduler)
        if num_scheduled > len(self._tickets):
            raise IntegrityError(f"prefill has {counts} prompts and {num_scheduled} scheduled")
        return {**counts, "queued_tokens": self.num_tokens}


def _set_all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        event.set()
