"""Many requests through a pair of servers, whole and in parts, some of which leave at any moment.

A request either ends in the answer of an undisturbed run or was cancelled, and nothing is left.
``RAYAPP_SOAK=10000`` takes as many requests as are asked of a release.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace

import pytest

from rayapp.distributed.serve.messages import KVPart
from rayapp.errors import RayappError
from tests.distributed.serve.replicas.pair import Pair, expected_tokens, request_of

NUM_REQUESTS = int(os.environ.get("RAYAPP_SOAK", "120"))
NUM_AT_ONCE = 12
LENGTHS, SEEDS = (5, 37, 90, 180), 5


def kind_of(number):
    """The kind of a request: all of one kind have the same answer."""
    return number % (len(LENGTHS) * SEEDS)


def request(number):
    length, seed = LENGTHS[kind_of(number) % len(LENGTHS)], kind_of(number) // len(LENGTHS)
    asked = request_of(f"r{number}", max_tokens=3 + 4 * seed, temperature=0.8, seed=seed)
    return replace(asked, prompt_token_ids=tuple((7 * i + seed) % 250 + 3 for i in range(length)))


async def answered(pair, asked):
    """The tokens of one request, conducted as the ingress does."""
    async with pair.begun(asked) as parted:
        if isinstance(parted.item, KVPart):
            await parted.reserve(wait_s=60.0)
            await parted.parts()
        tokens = [token for first in parted.item.firsts for token in first.token_ids]
        if parted.item.kv_bytes is None:
            return tokens
        await parted.end()
    return [*tokens, *await pair.rest(asked)]


async def left(pair, asked, after_s):
    """A request whose client leaves after a while; what it had got until then does not matter."""
    answering = asyncio.ensure_future(answered(pair, asked))
    await asyncio.wait({answering}, timeout=after_s)
    answering.cancel()
    await asyncio.gather(answering, return_exceptions=True)
    await pair.decode.cancel(asked.request_id, asked.attempt)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_seqs", [3, 16])
def test_requests_that_leave_at_any_moment_disturb_nobody(stage, num_seqs):
    rng = random.Random(num_seqs)
    expected = {kind: expected_tokens(stage, request(kind)) for kind in range(kind_of(-1) + 1)}

    async def scenario():
        pair = Pair(
            stage, in_parts=True, max_num_batched_tokens=48, max_num_seqs=num_seqs,
            max_waiting=NUM_AT_ONCE, transfer_s=60.0,
        )  # fmt: skip
        places = asyncio.Semaphore(NUM_AT_ONCE)

        async def one(number):
            async with places:
                if rng.random() < 0.1:
                    await left(pair, request(number), rng.expovariate(20.0))
                else:
                    assert await answered(pair, request(number)) == expected[kind_of(number)]

        await asyncio.gather(*map(one, range(NUM_REQUESTS)))
        await pair.check_idle()

    try:
        asyncio.run(asyncio.wait_for(scenario(), 3600))
    except RayappError as error:
        pytest.fail(f"a request ended in {error!r}")
