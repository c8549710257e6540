"""A prefill replica turns prompts into first tokens and KV messages.

The answer ends with two items: a small one at once, then the KV, or what has not been sent of it.
KV of long prompts leaves in parts while the rest is computed, later chunks of the prompt or later
blocks of the same chunk: every part is announced by a small item, which the message follows. Serve
makes every item an object that the *caller* owns, so the ingress keeps the KV of a replica that
dies right after.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from rayapp.api.service import Pool, ReplicaHealth
from rayapp.distributed.serve.callers import Callers
from rayapp.distributed.serve.messages import (
    ANY,
    Address,
    KVPart,
    Place,
    PrefillAnswer,
    Versions,
    check_address,
    version_conflict,
)
from rayapp.distributed.serve.node_room import NodeRoom
from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.part_sizes import PartSizes
from rayapp.distributed.serve.replicas.prompt_queue import PromptQueue
from rayapp.distributed.serve.replicas.serial_thread import SerialThread
from rayapp.distributed.serve.replicas.stage import StageModel
from rayapp.engine.channel import LocalChannel
from rayapp.engine.prefill import PrefillEngine, PrefillOutput
from rayapp.engine.request import PromptRequests
from rayapp.kv.ledger import KVShape, payload_bytes
from rayapp.kv.parts import Part
from rayapp.kv.pieces import Message
from rayapp.kv.segment import KVSegment
from rayapp.kv.wire import Envelope, pack
from rayapp.models.stack import BlockStack
from rayapp.scaling.reports import PrefillReport, Standing
from rayapp.vision.reader import ImageReader

PrefillItem = Any
"""An item of the stream of a prefill: a :class:`PrefillAnswer`, a :class:`Refusal`, a
:class:`KVPart`, or what a channel makes of a message."""


class PrefillServer:
    """The server of a prefill replica, which runs its prompts in chunks, shortest first.

    Args:
        stage: The prefill stage.
        place: The replica and the node of this server.
        loop: The loop that steps the engine, shared if both stages live in one replica.
        max_waiting: Prompts that may wait; further ones are refused.
        step_s: Seconds that a call of the engine or a packing may take.
        parts: The rule by which KV leaves in parts; None sends it whole.
        publish: The channel's way to a message that its receiver can get.
        room: The account of KV that this node's replicas share; None for no limit.
    """

    def __init__(
        self,
        stage: StageModel,
        place: Place,
        loop: EngineLoop,
        *,
        max_waiting: int,
        step_s: float,
        parts: PartSizes | None = None,
        publish: Callable[[Message], Any] = LocalChannel.publish,
        room: NodeRoom | None = None,
    ) -> None:
        self._room = room
        self._publish = publish
        self._stage = stage
        self._place = place
        self._loop = loop
        self._step_s = step_s
        self._packing = SerialThread("packing")
        self._callers = Callers()
        self._versions = stage.versions
        stack = BlockStack(stage.loaded.model, stage.plan, "prefill")
        self.engine = PrefillEngine(
            stack,
            stage.plan,
            max_model_len=stage.max_model_len,
            eos_token_ids=stage.loaded.eos_token_ids,
            tokenizer=stage.loaded.tokenizer,
            images=ImageReader(stage.loaded.model, stack, stage.images) if stage.images else None,
        )
        self._shape = KVShape.of(stack)
        self._parts = parts
        self.queue = PromptQueue(self.engine, loop, max_waiting=max_waiting, parts=parts)

    async def prefill(
        self,
        prompt: PromptRequests,
        versions: Versions,
        queue_s: float,
        byte_s: float = 0.0,
        address: Address = ANY,
    ) -> AsyncGenerator[PrefillItem, None]:
        """Yield a :class:`PrefillAnswer`, then the KV message unless the answer is complete.

        Before them, every part of the KV that leaves early comes as a :class:`KVPart` and its
        message; the last message then holds what is left. A replica of another version yields only
        a :class:`Refusal`.

        Args:
            prompt: The prompt to prefill, with the requests for all its answers; its name and
                attempt go into the KV's envelope.
            versions: The plan, weights and type that the caller wants.
            queue_s: Longest wait for a turn, seconds.
            byte_s: Seconds per byte of KV from here into pages, as the caller has measured them; 0
                if it has not.
            address: The address of the replica that the call is for.

        Raises:
            OverloadedError: Every waiting place is taken.
            DeadlineError: The request got no turn within ``queue_s``.
            RequestError: The request lies outside the limits.
        """
        check_address(self._place, address)
        refusal = version_conflict(self._place, self._versions, versions)
        if refusal is not None:
            yield refusal
            return
        if self._parts is not None:
            self._parts.handed_over(byte_s)
        caller = address.reader.actor
        results = self.queue.results(prompt, queue_s, self._room_for(prompt, caller))
        goes_on = False  # Whether KV is under way when this call ends.
        try:
            with self._callers.holding(caller, partial(self.queue.cancel, *prompt.key)):
                items = self._items(results, versions.envelope(*prompt.key))
                async with aclosing(items):
                    async for item in items:
                        yield item
                        if isinstance(item, PrefillAnswer):
                            goes_on = item.kv_bytes is not None
        finally:
            if self._room is not None and not goes_on:
                self._room.give(prompt.key)

    def _room_for(
        self, prompt: PromptRequests, caller: str
    ) -> Callable[[], Awaitable[None]] | None:
        """What takes room on this node for a prompt's KV; None if nobody counts it."""
        if self._room is None:
            return None
        num_tokens = prompt.prompt.num_prompt_tokens
        num_bytes = payload_bytes(self._shape, self._stage.plan, num_tokens)
        return partial(self._room.take, prompt.key, num_bytes, caller)

    async def _items(
        self, results: AsyncGenerator[Part | PrefillOutput, None], envelope: Envelope
    ) -> AsyncGenerator[PrefillItem, None]:
        """The items of a prompt, of what its queue yields."""
        began_s = time.monotonic()
        async with aclosing(results):
            async for result in results:
                if isinstance(result, PrefillOutput):
                    yield self._answer(result, began_s)
                    if result.segment is not None:
                        yield self._publish((await self._packed(result.segment, envelope))[0])
                else:
                    of_part = replace(envelope, is_last=False)
                    message, pack_s = await self._packed(result, of_part)
                    yield KVPart(self._place, envelope.part, result.extent, pack_s)
                    yield self._publish(message)
                    envelope = replace(envelope, part=envelope.part + 1)

    def _answer(self, output: PrefillOutput, began_s: float) -> PrefillAnswer:
        segment = output.segment
        return PrefillAnswer(
            place=self._place,
            firsts=output.firsts,
            kv_bytes=None if segment is None else segment.nbytes,
            queue_s=time.monotonic() - began_s - output.prefill_s,
            prefill_s=output.prefill_s,
            num_visual_tokens_removed=0 if segment is None else segment.num_visual_tokens_removed,
            prompt_logprobs=output.prompt_logprobs,
        )

    async def _packed(self, kv: KVSegment | Part, envelope: Envelope) -> tuple[Message, float]:
        """Pack KV beside the engine; return the message, and the seconds that it took."""
        message, num_bytes, pack_s = await self._packing.run(_timed_pack, kv, envelope)
        if self._parts is not None:
            self._parts.packed(num_bytes, pack_s)
        return message, pack_s

    async def cancel(self, name: str, attempt: int, address: Address = ANY) -> None:
        """End the prefill of this attempt, if it is here, and give up its room on this node."""
        self.queue.cancel(name, attempt)
        if self._room is not None:
            self._room.give((name, attempt))

    async def describe(self) -> ReplicaHealth:
        """Describe this replica for ``/health``."""
        return self.health("prefill")

    def health(self, pool: Pool) -> ReplicaHealth:
        """Describe this replica as a part of ``pool``."""
        return self._stage.health(
            pool,
            self._place,
            num_running=self.queue.num_running,
            num_waiting=self.queue.num_waiting,
            image_cache=self.engine.image_cache,
        )

    @property
    def queued_tokens(self) -> int:
        """Number of prompt tokens that are still to be computed."""
        return self.queue.num_tokens

    @property
    def report(self) -> PrefillReport:
        """The work of this replica, as routing and scaling count it."""
        return self.queue.report(self._stage.load_s)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers by which :class:`rayapp.distributed.serve.autoscaling.ServicePolicy` decides."""
        return self.report.numbers()

    def record_routing_stats(self) -> dict[str, float]:
        """Numbers by which the router chooses between replicas."""
        report = self.report
        return Standing(
            at_s=time.time(),
            work_s=report.queued_s,
            token_s=report.token_s,
            errand_s=0.0,
            num_failed=self._loop.num_failed,
            wait_s=report.queued_s,
        ).numbers()

    async def check_health(self) -> None:
        """Raise :class:`UnavailableError` if a call hangs; Serve asks this every few seconds."""
        self._loop.check_alive(self._step_s)
        self._packing.check_alive(self._step_s)

    async def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle."""
        counts = self.queue.check_integrity()
        if self._room is not None:
            counts["attempts_on_node"] = (await self._room.counts())["attempts"]
        return counts


def _timed_pack(kv: KVSegment | Part, envelope: Envelope) -> tuple[Message, int, float]:
    """The message, the bytes of its KV in the model's own type, and the seconds it took."""
    began_s = time.monotonic()
    segment = kv.segment() if isinstance(kv, Part) else kv
    message = pack(segment, envelope)
    return message, segment.nbytes, time.monotonic() - began_s
