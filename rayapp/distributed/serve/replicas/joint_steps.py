"""Steps of a replica of both stages that compute tokens and chunks of prompts in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.replicas.prompt_queue import Outcome, PromptStep
from rayapp.engine.joint import JointEngine
from rayapp.engine.prefill import PrefillOutput, PrefillRun
from rayapp.engine.request import TokenBatch
from rayapp.engine.scheduler import Chunk

_APART_S = 60.0
"""Seconds after a pass that raised in which tokens and chunks run apart (project default)."""


class JointSteps:
    """Runs the steps of a loop that have both kinds of work, where both can share a pass.

    A pass that raises ends the answers and the prompts in it. They come back, here or elsewhere,
    and one of them may be why: for a while tokens and chunks run apart then, so that it ends alone.

    Args:
        loop: The loop of both servers.
        prefill: The server of prompts.
        decode: The server of sequences.
    """

    def __init__(self, loop: EngineLoop, prefill: PrefillServer, decode: DecodeServer) -> None:
        self._loop, self._queue, self._decode = loop, prefill.queue, decode
        self.engine = JointEngine(prefill.engine, decode.engine)
        if self.engine.shares_passes:
            loop.attach(run_both=self._run)
        self._apart_until_s = 0.0

    async def _run(self, chunks: Sequence[Chunk]) -> None:
        if time.monotonic() < self._apart_until_s:
            await self._decode.run_tokens()
            await self._queue.run_chunks(chunks)
            return
        num_aside = self._decode.engine.num_aside
        step = self._queue.planned(chunks)
        try:
            batches, outcomes = await self._loop.run(self._compute, step)
        except Exception as error:  # noqa: BLE001 - raised to those who wait
            self._apart_until_s = time.monotonic() + _APART_S
            self._queue.settle(step, step.failed(error))
            await self._decode.fail_step(error)
            return
        self._decode.settle(batches, num_aside)
        self._queue.settle(step, outcomes)

    def _compute(self, step: PromptStep) -> tuple[list[TokenBatch], Mapping[str, Outcome]]:
        """Run a step on the engine's thread.

        Of its seconds, prompts count what the tokens would not have taken alone.
        """
        batches: list[TokenBatch] = []

        def advance(
            chunks: Sequence[tuple[PrefillRun, int]], noted: Callable[[], None] | None
        ) -> tuple[list[PrefillOutput], float]:
            tokens_s = self._decode.expected_step_s
            began_s = time.perf_counter()
            tokens, outputs = self.engine.step(chunks, noted)
            batches.extend(tokens)
            return outputs, max(0.0, time.perf_counter() - began_s - tokens_s)

        outcomes = self._queue.compute(step, advance)
        return batches, outcomes
