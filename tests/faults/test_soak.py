"""Hundreds of requests on a real cluster, of which some leave and whose replicas are killed.

Every request ends in the undisturbed answer, or was cancelled, and every count returns to zero.
``RAYAPP_CLUSTER_SOAK=10000`` takes as many requests as are asked of a release.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from tests.faults.test_losses import answered, opened, run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_REQUESTS = int(os.environ.get("RAYAPP_CLUSTER_SOAK", "500"))
NUM_AT_ONCE = 12
LENGTHS, SEEDS = (20, 100, 200, 400), 3
KILLS = ("prefill", "decode", "decode")


def kind_of(number):
    """The kind of a request: all of one kind have the same answer."""
    return number % (len(LENGTHS) * SEEDS)


def prompt_of(kind):
    return tuple((7 * i + kind) % 250 for i in range(LENGTHS[kind % len(LENGTHS)]))


def sampling_of(kind):
    seed = kind // len(LENGTHS)
    return SamplingParams(max_tokens=4 + 9 * seed, temperature=0.7, seed=seed, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(tiny_model):
    pipeline = LocalPipeline(tiny_model("llama"))
    kinds = range(len(LENGTHS) * SEEDS)
    found = pipeline.generate([prompt_of(k) for k in kinds], [sampling_of(k) for k in kinds])
    return [list(completion.token_ids) for completion in found]


@pytest.mark.timeout(3600)
def test_requests_that_leave_and_replicas_that_die_change_no_answer(standard, expected):
    standard.wait_whole()
    stage, _ = opened(standard)
    rng = random.Random(7)
    places = asyncio.Semaphore(NUM_AT_ONCE)
    moments = (NUM_REQUESTS // 4, NUM_REQUESTS // 2, 3 * NUM_REQUESTS // 4)
    kills = dict(zip(moments, KILLS, strict=True))

    async def one(number):
        async with places:
            if number in kills:
                pid = rng.choice(sorted(standard.replicas(kills[number]).values()))
                os.kill(pid, signal.SIGKILL)
            kind = kind_of(number)
            asked = GenerationRequest(f"soak-{number}", prompt_of(kind), sampling_of(kind))
            answering = asyncio.ensure_future(answered(stage.generate([asked])))
            if rng.random() < 0.1:
                await asyncio.wait({answering}, timeout=rng.expovariate(10.0))
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)
            else:
                assert await answering == expected[kind]

    async def scenario():
        await asyncio.gather(*map(one, range(NUM_REQUESTS)))

    run(scenario())
    assert not any(stage.counts().values())
    standard.wait_whole()
    standard.check_idle()
