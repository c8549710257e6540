"""A prefill and a decode server as plain objects, with a channel between them; no cluster."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from rayapp.distributed.serve.messages import (
    Address,
    Handover,
    KVPart,
    Place,
    Reader,
    Seating,
)
from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.part_sizes import PartSizes
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.channel import LocalChannel, LocalStream
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest, PromptRequests, TokenBatch
from rayapp.engine.sampling_params import SamplingParams
from rayapp.engine.sequences.memory import KVMemory

PROMPT = tuple(range(3, 40))
HERE = Place("here", "node")


def request_of(name, max_tokens=12, **sampling):
    return GenerationRequest(name, PROMPT, SamplingParams(max_tokens=max_tokens, **sampling))


def prompt_of(*requests):
    return PromptRequests.of(requests)


def reader_of(prompt):
    """A reader of its own for every attempt, as if each had its own ingress."""
    return Reader("{}-{}".format(*prompt.key))


async def delivered(server, following, reader):
    """The batches that a server delivers until an attempt's own call ends."""
    batches = []

    async def read():
        # A call ends by itself where no answer comes for a while; an ingress asks again, too.
        while True:
            async for rows in server.deliver(Address(reader=reader)):
                batches.extend(TokenBatch(*row) for row in rows)

    reading = asyncio.ensure_future(read())
    try:
        await following
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return batches


class Pair:
    """A prefill and a decode server with a channel between them."""

    def __init__(
        self,
        stage,
        *,
        max_num_seqs=2,
        max_waiting=8,
        max_num_batched_tokens=16,
        memory=None,
        in_parts=False,
        **deadlines,
    ):
        self.versions = stage.versions
        self.channel = LocalChannel()
        limits = Deadlines(**deadlines)
        self.prefill = PrefillServer(
            stage,
            HERE,
            EngineLoop(max_num_batched_tokens),
            max_waiting=max_waiting,
            step_s=limits.step_s,
            parts=PartSizes(0) if in_parts else None,
        )
        self.decode = DecodeServer(
            stage,
            HERE,
            EngineLoop(max_num_batched_tokens),
            fetch=self.channel.fetch,
            max_num_seqs=max_num_seqs,
            deadlines=limits,
            memory=memory or KVMemory(),
        )

    @asynccontextmanager
    async def prefilled(self, *requests):
        items = self.prefill.prefill(prompt_of(*requests), self.versions, 5.0)
        async with aclosing(LocalStream(items)) as stream:
            answer = await stream.item()
            async with self.channel.received(stream) as handle:
                yield answer, handle

    async def admitted(self, *requests, wait_s=5.0, sent=None):
        async with self.prefilled(*requests) as (answer, handle):
            handover = Handover.after(
                prompt_of(*requests), self.versions, answer.firsts, sent or {}, wait_s
            )
            address = Address(reader=reader_of(handover.prompt))
            return answer, await self.decode.admit(handover, [handle], address)

    @asynccontextmanager
    async def begun(self, *requests):
        """A prompt whose KV comes in parts: the stream, its first item, and what conducts them."""
        prompt = prompt_of(*requests)
        items = self.prefill.prefill(prompt, self.versions, 60.0)
        async with aclosing(LocalStream(items)) as stream:
            yield Parted(self, prompt, stream, await stream.item())

    async def handed_over(self, *requests, wait_s=60.0):
        """Prefill, hand over in parts or whole, and return the first token of every answer."""
        async with self.begun(*requests) as parted:
            if isinstance(parted.item, KVPart):
                await parted.reserve(wait_s)
                await parted.parts()
            await parted.end(wait_s=wait_s)
            return [token for first in parted.item.firsts for token in first.token_ids]

    async def rest(self, *requests):
        """The tokens of the first request, or those of several by name."""
        tokens = {request.request_id: [] for request in requests}
        prompt = prompt_of(*requests)
        following = self.decode.follow(*prompt.key)
        for batch in await delivered(self.decode, following, reader_of(prompt)):
            tokens[batch.request_id].extend(batch.token_ids)
        return tokens if len(requests) > 1 else tokens[requests[0].request_id]

    async def check_idle(self):
        for _ in range(200):
            counts = {**await self.prefill.check_integrity(), **await self.decode.check_integrity()}
            if not any(counts.values()):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(counts)


class Parted:
    """A handover in parts, step by step, as the ingress conducts it."""

    def __init__(self, pair, prompt, stream, item):
        self.pair, self.prompt, self.stream, self.item = pair, prompt, stream, item
        self.num_parts = 0
        self.copied = []

    @property
    def _address(self):
        return Address(reader=reader_of(self.prompt))

    async def reserve(self, wait_s=60.0):
        seating = Seating(self.prompt, self.pair.versions, self.item.extent, wait_s)
        return await self.pair.decode.reserve(seating, self._address)

    async def part(self, number=None):
        """Hand one part over; the item after it is read."""
        handle = await self.pair.channel.part(self.stream)
        number = self.num_parts if number is None else number
        try:
            copied = await self.pair.decode.load(*self.prompt.key, number, [handle])
        finally:
            self.pair.channel.release(handle)
        self.copied.append(copied)
        self.num_parts += 1
        self.item = await self.stream.item()

    async def parts(self):
        while isinstance(self.item, KVPart):
            await self.part()

    async def end(self, sent=None, wait_s=60.0):
        firsts = self.item.firsts
        handover = Handover.after(self.prompt, self.pair.versions, firsts, sent or {}, wait_s)
        handover = replace(handover, part=self.num_parts)
        async with self.pair.channel.received(self.stream) as handle:
            admission = await self.pair.decode.admit(handover, [handle], self._address)
        self.copied.append(admission.copied)
        return admission


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 120))


def expected_tokens(stage, request):
    pipeline = LocalPipeline(stage.loaded.model, stage.loaded.tokenizer, stage.plan)
    return list(pipeline.generate([request.prompt_token_ids], request.sampling)[0].token_ids)
