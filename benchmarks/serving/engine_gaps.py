"""Gaps between the tokens of a running stream by the engine's own clock, without HTTP and Ray.

The servers of the replicas run in this process as plain objects, so that the clock stands where the
tokens are made and nothing but the engine's own work can be waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np

from rayapp.distributed.serve.messages import Handover, Place
from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.replicas.stage import StageModel
from rayapp.distributed.serve.replicas.unified_server import UnifiedServer
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.channel import LocalChannel, LocalStream
from rayapp.engine.request import GenerationRequest, PromptRequests
from rayapp.engine.sampling_params import SamplingParams

_HERE = Place("here", "here")
_MAX_NUM_SEQS = 8
_LONG_S = 3600.0


class StepClock:
    """Notes when the calls of a method end, and how long each took."""

    def __init__(self, engine: Any, name: str) -> None:
        self.ended_s: list[float] = []
        self.took_s: list[float] = []
        self._compute: Callable[..., Any] = getattr(engine, name)
        setattr(engine, name, self._timed)

    def _timed(self, *arguments: Any) -> Any:
        began_s = time.monotonic()
        result = self._compute(*arguments)
        self.ended_s.append(time.monotonic())
        self.took_s.append(self.ended_s[-1] - began_s)
        return result

    def gaps(self, since_s: float, until_s: float, *others: StepClock) -> list[float]:
        """Seconds from the end of one call, of this clock or others, to the next one's.

        Only calls that ended between two moments count.
        """
        every = sorted(at_s for clock in (self, *others) for at_s in clock.ended_s)
        ends = [at_s for at_s in every if since_s <= at_s <= until_s]
        return [later - earlier for earlier, later in itertools.pairwise(ends)]


def unified_gaps(
    stage: StageModel, *, chunk_tokens: int, long_tokens: int, num_long: int, short_tokens: int
) -> dict[str, float]:
    """The gaps of a stream in a unified replica while long prompts are prefilled beside it."""

    async def scenario() -> dict[str, float]:
        server = UnifiedServer(
            stage,
            _HERE,
            max_num_seqs=_MAX_NUM_SEQS,
            max_waiting=64,
            max_num_batched_tokens=chunk_tokens,
            deadlines=_patient(),
        )
        steps = StepClock(server._decode.engine, "step")
        chunks = StepClock(server._prefill.engine, "advance")
        both = StepClock(server.joint.engine, "step")
        reading = _running(_delivered(server))
        stream = _running(server.generate(_prompt(stage, short_tokens), stage.versions, {}))
        await _until(lambda: len(steps.ended_s) > 2)
        alone_s, began_s = statistics.median(steps.took_s), time.monotonic()
        done = len(chunks.took_s)
        prompts = [_prompt(stage, long_tokens, 2) for _ in range(num_long)]
        await asyncio.gather(
            *(_drained(server.generate(prompt, stage.versions, {})) for prompt in prompts)
        )
        gaps = steps.gaps(began_s, time.monotonic(), both)
        stream.cancel()
        reading.cancel()
        await asyncio.gather(stream, reading, return_exceptions=True)
        return _numbers(gaps, alone_s, max(*chunks.took_s[done:], *both.took_s))

    return asyncio.run(scenario())


def decode_gaps(
    stage: StageModel, *, chunk_tokens: int, long_tokens: int, num_long: int, short_tokens: int
) -> dict[str, float]:
    """The gaps of a stream in a decode replica while the KV of long prompts arrives."""

    async def scenario() -> dict[str, float]:
        channel = LocalChannel()
        prefill = PrefillServer(
            stage, _HERE, EngineLoop(chunk_tokens), max_waiting=64, step_s=_LONG_S
        )
        decode = DecodeServer(
            stage,
            _HERE,
            EngineLoop(chunk_tokens),
            fetch=channel.fetch,
            max_num_seqs=_MAX_NUM_SEQS,
            deadlines=_patient(),
        )
        steps = StepClock(decode.engine, "step")

        async def admitted(prompt: PromptRequests, go: asyncio.Event) -> None:
            items = prefill.prefill(prompt, stage.versions, _LONG_S)
            async with aclosing(LocalStream(items)) as stream:
                answer = await stream.item()
                async with channel.received(stream) as handle:
                    await go.wait()
                    handover = Handover.after(prompt, stage.versions, answer.firsts, {}, _LONG_S)
                    await decode.admit(handover, [handle])

        go = asyncio.Event()
        prompts = [_prompt(stage, long_tokens, 2) for _ in range(num_long)]
        arriving = [asyncio.ensure_future(admitted(prompt, go)) for prompt in prompts]
        await _until(lambda: channel_is_full(prefill))
        ready = asyncio.Event()
        ready.set()
        running = _prompt(stage, short_tokens)
        await admitted(running, ready)
        stream = _running(_delivered(decode))
        await _until(lambda: len(steps.ended_s) > 2)
        alone_s, began_s = statistics.median(steps.took_s), time.monotonic()
        go.set()
        await asyncio.gather(*arriving)
        await _until(lambda: len(steps.gaps(began_s, time.monotonic())) > 4 * num_long)
        gaps = steps.gaps(began_s, time.monotonic())
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        return _numbers(gaps, alone_s, alone_s)

    return asyncio.run(scenario())


def channel_is_full(prefill: PrefillServer) -> bool:
    """True once no prompt is on its way through prefill any more."""
    return not prefill.queued_tokens and not prefill.health("prefill").num_running


def _numbers(gaps: list[float], alone_s: float, unit_s: float) -> dict[str, float]:
    """Quantiles of the gaps; ``unit_s`` is what one of them may be made of twice."""
    gap_s = float(np.percentile(gaps, 99.9))
    return {
        "steps": len(gaps),
        "step_alone_s": alone_s,
        "gap_p50_s": statistics.median(gaps),
        "gap_p999_s": gap_s,
        "unit_s": unit_s,
        "gap_in_units": gap_s / unit_s,
    }


def _patient() -> Deadlines:
    names = ("queue_s", "prefill_s", "transfer_s", "decode_s", "lease_s", "step_s")
    return Deadlines(**dict.fromkeys(names, _LONG_S))


def _prompt(stage: StageModel, num_tokens: int, num_answer: int | None = None) -> PromptRequests:
    rng = random.Random(num_tokens)
    ids = tuple(rng.randrange(10, 250) for _ in range(num_tokens))
    limit = num_answer or stage.max_model_len - num_tokens
    sampling = SamplingParams(max_tokens=limit, ignore_eos=True)
    return PromptRequests.of(
        [GenerationRequest(f"{rng.random()}-{time.monotonic()}", ids, sampling)]
    )


async def _drained(items: AsyncGenerator[Any, None]) -> None:
    async with aclosing(items):
        async for _ in items:
            pass


async def _delivered(server: DecodeServer | UnifiedServer) -> AsyncGenerator[Any, None]:
    """The tokens of all answers, in call after call, as an ingress asks for them."""
    while True:
        async with aclosing(server.deliver()) as items:
            async for item in items:
                yield item


def _running(items: AsyncGenerator[Any, None]) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(_drained(items))


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
