"""The stand-in of the delivery benchmark gives every token once, in either way."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from rayapp.distributed.serve.messages import Address, Place, Reader, Versions
from rayapp.engine.request import GenerationRequest, PromptRequests
from rayapp.engine.sampling_params import SamplingParams
from tests.distributed.serve.replicas.pair import delivered

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VERSIONS = Versions("p", "w", "float32")
HERE = Address(reader=Reader("r"))


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def prompt_of(name):
    return PromptRequests.of([GenerationRequest(name, (1,), SamplingParams(max_tokens=9))])


def test_both_ways_bring_the_same_tokens():
    from serving.stand_in import StandIn

    async def scenario():
        replica = StandIn(200.0, Place("here", "node"))

        async def generated():
            items = replica.generate(prompt_of("step"), VERSIONS, {}, HERE)
            return [item async for item in items]

        by_step = await delivered(replica, generated(), HERE.reader)
        _, *by_stream = [item async for item in replica.stream(prompt_of("stream"), VERSIONS)]
        assert not any((await replica.check_integrity()).values())
        tokens = [sum((batch.token_ids for batch in by_step), ())]
        tokens.append(sum((batch.token_ids for (batch,) in by_stream), ()))
        assert tokens[0] == tokens[1] == tuple(range(98, 106))

    asyncio.run(asyncio.wait_for(scenario(), 20))
