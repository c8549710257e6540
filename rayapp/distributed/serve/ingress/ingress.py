"""The deployment that speaks HTTP: it builds the service over its handles, and then the routes."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import FastAPI
from ray import serve

from rayapp.api.routes import build_app
from rayapp.api.service import ServiceDescription
from rayapp.api.tracing import RequestTraces
from rayapp.distributed.serve.channel import ObjectStoreChannel
from rayapp.distributed.serve.ingress.answering import Attempts
from rayapp.distributed.serve.ingress.disaggregated import DisaggregatedAttempts
from rayapp.distributed.serve.ingress.ray_service import Limits, RayService
from rayapp.distributed.serve.ingress.short_way import ShortWayAttempts
from rayapp.distributed.serve.ingress.siblings import Tallies
from rayapp.distributed.serve.ingress.unified import UnifiedAttempts
from rayapp.distributed.serve.messages import Versions
from rayapp.distributed.serve.ray_metrics import RayMirror, log_as_serve
from rayapp.distributed.serve.settings import (
    APP_NAME,
    DECODE,
    INGRESS,
    PREFILL,
    UNIFIED,
    ServiceSettings,
)
from rayapp.kv.ledger import KVShape, Ledger
from rayapp.kv.ledger_files import LedgerFiles
from rayapp.models.architecture import compute_dtype, text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import locate
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import PruningPlan
from rayapp.vision.inputs import ImageIntake


class Ingress:
    """An ingress replica, which owns every KV reference between prefill and decode.

    Args:
        settings: The settings of the service.
        pools: Serve's handles by pool.
    """

    def __init__(self, settings: ServiceSettings, **pools: Any) -> None:
        self._key_digest = settings.key_digest
        log_as_serve()
        self.service = open_service(settings, pools, serve.get_deployment_handle(INGRESS, APP_NAME))
        self.service.metrics.mirror = RayMirror(self.service.ledger)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP routes; Serve calls this once after construction."""
        return build_app(
            self.service,
            key_digest=self._key_digest,
            metrics=self.service.metrics,
            traces=RequestTraces.configured(),
        )

    async def tallies(self) -> Tallies:
        """Return what this replica has counted, and what it knows of others."""
        return self.service.tallies()

    async def drain(self) -> int:
        """Refuse new requests from now on, and return the number of answers under way."""
        return self.service.drain()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers by which :class:`rayapp.distributed.serve.autoscaling.ServicePolicy` decides."""
        return self.service.report.numbers()

    async def check_integrity(self) -> dict[str, int]:
        """Return the numbers of this replica's resources in use, all zero when idle."""
        return self.service.counts()


def open_service(
    settings: ServiceSettings,
    pools: dict[str, Any],
    siblings: Any,
    channel: ObjectStoreChannel | None = None,
) -> RayService:
    """The token stream over a running application's pools; works in any process of the cluster.

    Args:
        settings: The settings of the service.
        pools: Serve's handles by pool.
        siblings: Serve's handle of the ingress, whose ledgers are merged.
        channel: The channel that owns the KV on its way.

    Raises:
        ModelError: The model cannot be read here.
        PlanError: The plan cannot be read here, or was made for another model.
    """
    checkpoint = Checkpoint(locate(settings.model, settings.revision).directory)
    plan = PruningPlan.load(settings.plan) if settings.plan else PruningPlan()
    signature = checkpoint.signature()
    plan.check_model(signature)
    versions = Versions.of(plan, signature, compute_dtype(checkpoint.config, settings.dtype))
    channel = channel or ObjectStoreChannel(max_pinned_bytes=settings.max_kv_bytes)
    # Where Serve is told to call by gRPC, answers have no references, and are small.
    pools = {name: handle.options(_by_reference=True) for name, handle in pools.items()}
    ledger = Ledger()
    if settings.ledger_dir is not None:
        ledger.files = LedgerFiles(settings.ledger_dir, f"transfers-{uuid.uuid4().hex}")
    return RayService(
        _description(settings, plan, checkpoint),
        pools=pools,
        siblings=siblings,
        attempts=_attempts(settings, pools, channel, ledger, plan, versions, checkpoint),
        channel=channel,
        ledger=ledger,
        versions=versions,
        limits=Limits(settings.max_waiting, settings.max_attempts, settings.deadlines.queue_s),
    )


def _description(
    settings: ServiceSettings, plan: PruningPlan, checkpoint: Checkpoint
) -> ServiceDescription:
    text = text_config(checkpoint.config)
    return ServiceDescription(
        model_name=settings.model_name,
        max_model_len=settings.max_model_len or text.max_position_embeddings,
        vocab_size=text.vocab_size,
        tokenizer=load_tokenizer(checkpoint.path),
        plan=plan,
        mode=settings.mode,
        images=ImageIntake.of(checkpoint.config, settings.images),
    )


def _attempts(
    settings: ServiceSettings,
    pools: dict[str, Any],
    channel: ObjectStoreChannel,
    ledger: Ledger,
    plan: PruningPlan,
    versions: Versions,
    checkpoint: Checkpoint,
) -> Attempts:
    if settings.mode == "unified":
        return UnifiedAttempts(pools[UNIFIED], versions=versions, deadlines=settings.deadlines)
    config = checkpoint.config
    usual = DisaggregatedAttempts(
        pools[PREFILL],
        pools[DECODE],
        channel=channel,
        ledger=ledger,
        plan=plan,
        shape=KVShape.of_config(config, compute_dtype(config, settings.dtype)),
        versions=versions,
        settings=settings,
    )
    if not settings.short_prompt_tokens:
        return usual
    return ShortWayAttempts(
        usual,
        UnifiedAttempts(pools[DECODE], versions=versions, deadlines=settings.deadlines),
        most_tokens=settings.short_prompt_tokens,
        tpot_s=settings.scaling.targets.tpot_s,
    )
