"""The replicas that Serve constructs from settings: servers that load their own stage.

A replica whose engine hangs ends its own process. Serve would stop it gracefully, and so wait for
the very calls that hang, while it holds the resources that its successor needs; a process that has
ended is noticed at once, by its callers too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable

from rayapp.distributed.serve.callers import this_actor
from rayapp.distributed.serve.channel import ObjectStoreChannel
from rayapp.distributed.serve.node_room import NodeRoom
from rayapp.distributed.serve.ray_metrics import StageGauges, log_as_serve
from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.kv_memory import kv_memory
from rayapp.distributed.serve.replicas.part_sizes import PartSizes
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.replicas.stage import load_stage, this_place
from rayapp.distributed.serve.replicas.unified_server import UnifiedServer
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import UnavailableError

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
    """A decode server that loads its own stage and fetches from the object store."""

    def __init__(self, settings: ServiceSettings) -> None:
        log_as_serve()
        self._gauges = StageGauges()
        stage = load_stage(settings, "decode")
        super().__init__(
            stage,
            this_place(),
            EngineLoop(settings.max_num_batched_tokens),
            fetch=ObjectStoreChannel.fetch,
            max_num_seqs=settings.max_num_seqs,
            deadlines=settings.deadlines,
            memory=kv_memory(settings, stage.loaded.model.device),
            tpot_s=settings.scaling.targets.tpot_s,
        )

    async def check_health(self) -> None:
        """Show this replica's state, and end its process if its engine hangs."""
        self._gauges.show(await self.describe())
        await _alive_or_end(super().check_health())


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


async def _alive_or_end(check: Awaitable[None]) -> None:
    try:
        await check
    except UnavailableError:
        logger.exception("this replica is broken and ends")
        logging.shutdown()
        os._exit(1)
