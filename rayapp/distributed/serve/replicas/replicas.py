"""The replicas that Serve constructs from settings: servers that load their own stage.

A replica whose engine hangs ends its own process. Serve would stop it gracefully, and so wait for
the very calls that hang, while it holds the resources that its successor needs; a process that has
ended is noticed at once, by its callers too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from rayapp.distributed.serve.callers import this_actor
from rayapp.distributed.serve.channel import ObjectStoreChannel
from rayapp.distributed.serve.messages import ANY, Address, Versions
from rayapp.distributed.serve.node_room import NodeRoom
from rayapp.distributed.serve.ray_metrics import StageGauges, log_as_serve
from rayapp.distributed.serve.replicas.both_stages import BothStages, GeneratedItem
from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.joint_steps import JointSteps
from rayapp.distributed.serve.replicas.kv_memory import kv_memory
from rayapp.distributed.serve.replicas.part_sizes import PartSizes
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.replicas.short_way import short_way_obstacle
from rayapp.distributed.serve.replicas.stage import load_stage, this_place
from rayapp.distributed.serve.replicas.unified_server import UnifiedServer
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.engine.channel import LocalChannel, LocalHandle
from rayapp.engine.request import PromptRequests
from rayapp.errors import IntegrityError, UnavailableError

logger = logging.getLogger(__name__)


class PrefillReplica(PrefillServer):
    """A prefill server that loads its own stage."""

    def __init__(self, settings: ServiceSettings) -> None:
        log_as_serve()
        self._gauges = StageGauges()
        place, most = this_place(), settings.max_node_kv_bytes
        super().__init__(
            load_stage(settings, "prefill"),
            place,
            EngineLoop(settings.max_num_batched_tokens),
            max_waiting=settings.max_admitted,
            step_s=settings.deadlines.step_s,
            parts=PartSizes(settings.kv_part_ms / 1000),
            publish=ObjectStoreChannel.publish,
            room=None if most is None else NodeRoom(place.node, most, this_actor()),
        )

    async def check_health(self) -> None:
        """Show this replica's state, and end its process if its engine hangs."""
        self._gauges.show(await self.describe())
        await _alive_or_end(super().check_health())


class DecodeReplica(DecodeServer):
    """A decode server that loads its own stage and fetches from the object store.

    Where its weights suffice and the settings allow it, it prefills short prompts itself.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        log_as_serve()
        self._gauges = StageGauges()
        obstacle = short_way_obstacle(settings)
        stage = load_stage(settings, "decode", runs_both=obstacle is None)
        place, loop = this_place(), EngineLoop(settings.max_num_batched_tokens)
        super().__init__(
            stage,
            place,
            loop,
            fetch=_fetched,
            max_num_seqs=settings.max_num_seqs,
            deadlines=settings.deadlines,
            memory=kv_memory(settings, stage.loaded.model.device),
            tpot_s=settings.scaling.targets.tpot_s,
        )
        self._most_prompt = settings.short_prompt_tokens
        self._prompts: PrefillServer | None = None
        if obstacle is not None:
            logger.info("all prompts are prefilled apart: %s", obstacle)
            return
        self._prompts = PrefillServer(
            stage,
            place,
            loop,
            max_waiting=settings.max_waiting,
            step_s=settings.deadlines.step_s,
        )
        JointSteps(loop, self._prompts, self)
        first = stage.plan.first_token
        self._both = BothStages(self._prompts, self, LocalChannel(), settings.deadlines, first)

    async def generate(
        self,
        prompt: PromptRequests,
        versions: Versions,
        sent: Mapping[str, Sequence[int]],
        address: Address = ANY,
    ) -> AsyncGenerator[GeneratedItem, None]:
        """Prefill a short prompt here; see :meth:`BothStages.generate`."""
        if self._prompts is None:
            raise IntegrityError("a decode replica without prefill was sent a prompt")
        items = self._both.generate(prompt, versions, sent, address)
        async with aclosing(items) as generated:
            async for item in generated:
                yield item

    async def cancel(self, name: str, attempt: int, address: Address = ANY) -> None:
        """End this attempt, in whatever phase it is, even before it has come here."""
        if self._prompts is not None:
            await self._prompts.cancel(name, attempt)
        await super().cancel(name, attempt)

    def record_routing_stats(self) -> dict[str, float]:
        """Numbers by which the router chooses between replicas, and between the ways to them."""
        stats = super().record_routing_stats()
        if self._prompts is None:
            return stats
        report = self._prompts.report
        return {
            **stats,
            "work_s": stats["work_s"] + report.queued_s,
            "token_s": report.token_s,
            "prompts_s": report.queued_s,
            "most_prompt": float(self._most_prompt),
        }

    async def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle; raise if they disagree."""
        counts = await super().check_integrity()
        if self._prompts is None:
            return counts
        prompts = await self._prompts.check_integrity()
        running = counts.pop("running") + prompts.pop("running")
        return {**counts, **prompts, "running": running, "pinned_bytes": self._both.pinned_bytes}

    async def check_health(self) -> None:
        """Show this replica's state, and end its process if its engine hangs."""
        self._gauges.show(await self.describe())
        await _alive_or_end(super().check_health())
        if self._prompts is not None:
            await _alive_or_end(self._prompts.check_health())


class UnifiedReplica(UnifiedServer):
    """A unified server that loads both stages once."""

    def __init__(self, settings: ServiceSettings) -> None:
        log_as_serve()
        self._gauges = StageGauges()
        stage = load_stage(settings, "unified")
        super().__init__(
            stage,
            this_place(),
            max_num_seqs=settings.max_num_seqs,
            max_waiting=settings.max_admitted,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            deadlines=settings.deadlines,
            memory=kv_memory(settings, stage.loaded.model.device),
            tpot_s=settings.scaling.targets.tpot_s,
        )

    async def check_health(self) -> None:
        """Show this replica's state, and end its process if its engine hangs."""
        self._gauges.show(await self.describe())
        await _alive_or_end(super().check_health())


async def _fetched(handle: Any) -> Any:
    """Get a message, from the object store or from this process."""
    if isinstance(handle, LocalHandle):
        return await LocalChannel.fetch(handle)
    return await ObjectStoreChannel.fetch(handle)


async def _alive_or_end(check: Awaitable[None]) -> None:
    try:
        await check
    except UnavailableError:
        logger.exception("this replica is broken and ends")
        logging.shutdown()
        os._exit(1)
