"""The replicas that Serve constructs from settings: servers that load their own stage."""

from __future__ import annotations

from rayapp.distributed.serve.channel import ObjectStoreChannel
from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.replicas.stage import load_stage, this_place
from rayapp.distributed.serve.replicas.unified_server import UnifiedServer
from rayapp.distributed.serve.settings import ServiceSettings


class PrefillReplica(PrefillServer):
    """A prefill server that loads its own stage."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__(
            load_stage(settings, "prefill"),
            this_place(),
            max_waiting=settings.max_waiting,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )


class DecodeReplica(DecodeServer):
    """A decode server that loads its own stage and fetches from the object store."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__(
            load_stage(settings, "decode"),
            this_place(),
            fetch=ObjectStoreChannel.fetch,
            max_num_seqs=settings.max_num_seqs,
            deadlines=settings.deadlines,
        )


class UnifiedReplica(UnifiedServer):
    """A unified server that loads both stages once."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__(
            load_stage(settings, "unified"),
            this_place(),
            max_num_seqs=settings.max_num_seqs,
            max_waiting=settings.max_waiting,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            deadlines=settings.deadlines,
        )
