"""The loop of one replica: step after step, while there is work, whatever stages it runs.

A prefill replica runs chunks of prompts, a decode replica tokens of running sequences, a unified
one both. They share this loop and its scheduler, and differ in the parts that are attached to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from rayapp.distributed.serve.replicas.serial_thread import SerialThread
from rayapp.engine.scheduler import Chunk, Scheduler, Step
from rayapp.errors import IntegrityError, OverloadedError, RayappError, UnavailableError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
# Steps that may fail one after the other before the replica counts as broken.
_MAX_FAILED = 8


class Sequences(Protocol):
    """The running sequences of a replica."""

    @property
    def num_running(self) -> int:
        """Number of sequences that compute a token in the next step."""
        ...

    async def run_tokens(self) -> None:
        """Compute a token of every running sequence and deliver it; an error ends them, no more."""
        ...


RunChunks = Callable[[Sequence[Chunk]], Awaitable[None]]
"""Computes chunks of prompts and delivers what ends; an error ends these prompts, and no more."""


class EngineLoop:
    """Runs the steps of a replica's engines on one thread.

    Within a step, tokens of running sequences are computed before the chunks, or with them, so they
    never wait for more than the chunks of one step.

    Args:
        max_num_batched_tokens: Tokens that one step may compute.

    Attributes:
        num_failed: Steps that failed one after the other.
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        self.thread = SerialThread("engine")
        self.scheduler = Scheduler(max_num_batched_tokens)
        self._sequences: Sequences | None = None
        self._run_chunks: RunChunks | None = None
        self._run_both: RunChunks | None = None
        self._check_idle: Callable[[], None] | None = None
        self._broken: IntegrityError | None = None
        self.num_failed = 0
        self._working: asyncio.Task[None] | None = None

    def attach(
        self,
        *,
        sequences: Sequences | None = None,
        run_chunks: RunChunks | None = None,
        run_both: RunChunks | None = None,
        check_idle: Callable[[], None] | None = None,
    ) -> None:
        """Give the loop a part of its work; a part that was attached before stays.

        Args:
            sequences: The running sequences.
            run_chunks: Computes chunks of prompts.
            run_both: Computes chunks and a token of every running sequence in one pass; without it
                tokens are computed and delivered before the chunks.
            check_idle: Called on the thread after the last step; an :class:`IntegrityError` that it
                raises means that the replica is broken.
        """
        self._sequences = sequences or self._sequences
        self._run_chunks = run_chunks or self._run_chunks
        self._run_both = run_both or self._run_both
        self._check_idle = check_idle or self._check_idle

    def wake(self) -> None:
        """Start stepping, unless the loop does so already; call this wherever work appears."""
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work())

    async def run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Return the result of a step's computation; failures in a row are counted."""
        try:
            result = await self.thread.run(call, *arguments)
        except Exception:
            self.num_failed += 1
            raise
        self.num_failed = 0
        return result

    def check_alive(self, limit_s: float) -> None:
        """Raise :class:`UnavailableError` if no step succeeds any more, or its books are wrong.

        Args:
            limit_s: Seconds that one call on the thread may take.
        """
        self.thread.check_alive(limit_s)
        if self._broken is not None:
            raise UnavailableError(f"the replica is replaced, it lost count: {self._broken}")
        if self.num_failed >= _MAX_FAILED:
            raise UnavailableError(
                f"{self.num_failed} steps failed one after the other, and {_MAX_FAILED} are too "
                "many; the replica is replaced: see its log"
            )

    async def _work(self) -> None:
        is_checked = False
        while True:
            step = self.scheduler.next_step(self._num_running)
            if step:
                is_checked = False
                await self._take(step)
            elif is_checked:
                return
            else:
                await self._look_into_books()
                is_checked = True  # Work that came meanwhile is seen by one more look.

    async def _take(self, step: Step) -> None:
        if self._run_both is not None and step.num_running and step.chunks:
            await self._run_both(step.chunks)
            return
        if self._sequences is not None and step.num_running:
            await self._sequences.run_tokens()
        if self._run_chunks is not None and step.chunks:
            await self._run_chunks(step.chunks)

    async def _look_into_books(self) -> None:
        """Check whether pages and slots agree, now that nobody waits for a step."""
        if self._check_idle is None:
            return
        try:
            await self.thread.run(self._check_idle)
        except IntegrityError as error:
            logger.critical("an idle replica is broken: %s", error)
            self._broken = error

    @property
    def _num_running(self) -> int:
        return 0 if self._sequences is None else self._sequences.num_running


def failure_of(error: Exception, work: str) -> RayappError:
    """The error that the requests of a failed step get: our own as it is, others explained.

    Args:
        error: The exception of the step.
        work: The kind of step, for the text.
    """
    if isinstance(error, RayappError):
        return error
    if is_out_of_memory(error):
        return OverloadedError(
            f"a {work} step found too little memory ({error}); try again later, or lower "
            "max_num_seqs, max_model_len or max_num_batched_tokens"
        )
    return UnavailableError(
        f"a {work} step failed: {type(error).__name__}: {error}; ask again, and see the replica's "
        "log if it stays so"
    )


def is_out_of_memory(error: Exception) -> bool:
    """True if a computation found too little memory, on whatever device."""
    # torch has no class of its own for the memory of the CPU.
    is_named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_named or "can't allocate memory" in str(error)
