"""``rayapp serve`` runs a service until it is interrupted, and then removes all of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from math import ceil, floor
from types import FrameType
from typing import Any

from rayapp.distributed.cluster.local import NodeSpec, local_cluster
from rayapp.distributed.cluster.ports import check_port
from rayapp.distributed.serve import decisions
from rayapp.distributed.serve.deploy import RunningService, resolved, running_service
from rayapp.distributed.serve.draining import drain
from rayapp.distributed.serve.exposure import check_exposure
from rayapp.distributed.serve.replicas.short_way import short_way_obstacle
from rayapp.distributed.serve.settings import PoolSettings, ServiceSettings

_LOOK_S = 2.0
_SPARE_CPUS = 2  # These are for the controller, the proxy and the ingress.


def serve_until_interrupted(
    settings: ServiceSettings,
    *,
    address: str | None = None,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM, then end everything that was started.

    Answers under way are waited for, unless another signal comes.

    Args:
        settings: The settings of the service.
        address: Cluster to serve on; None starts a local one with a node per pool.
        say: Function that shows a line to the person at the terminal, such as the ready line.

    Raises:
        InputError: Model, plan or address cannot be used.
        ClusterError: The cluster cannot hold the service.
    """
    check_exposure(settings)
    if address is None:
        # Serve would share the port, or wait for it.
        check_port(settings.host, settings.port)
    settings = resolved(settings)  # Errors of model or plan are raised before anything starts.
    before = _on_signals(_interrupt)
    try:
        with ExitStack() as stack:
            if address is None:
                # On any other node the ingress could take the place of a replica.
                ingress = settings.ingress.model_copy(update={"labels": {"role": "head"}})
                settings = settings.model_copy(update={"ingress": ingress})
                address = stack.enter_context(local_cluster(_nodes(settings))).address
            service = stack.enter_context(running_service(settings, address=address))
            stack.callback(_on_signals, signal.SIG_IGN)  # No signal may stop the clean-up.
            _on_signals(_interrupt)  # Ray has installed its own handlers in the meantime.
            for line in _introduction(service):
                say(line)
            with suppress(KeyboardInterrupt):
                _tell_decisions(say)
            say("stopping")
            with suppress(KeyboardInterrupt):  # A second signal ends the answers under way.
                drain(settings.deadlines.drain_s, say)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signals(handler: Any) -> dict[int, Any]:
    """Install ``handler`` for SIGINT and SIGTERM; return the handlers that it replaced."""
    return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _tell_decisions(say: Callable[[str], None]) -> None:
    """Say every decision about the size of a pool with its reason, until this is interrupted."""
    told_s, waiting = 0.0, threading.Event()
    while True:
        for decision in decisions.read():
            if decision.at_s > told_s:
                told_s = decision.at_s
                say(decision.text)
        waiting.wait(_LOOK_S)


def _nodes(settings: ServiceSettings) -> list[NodeSpec]:
    """Specify a head node, and a node per pool with room for all of its replicas."""

    def room(pool: PoolSettings) -> int:
        return max(1, round(pool.replicas.maximum * max(pool.num_cpus, 1.0)))

    def node(pool: PoolSettings) -> NodeSpec:
        gpus = _gpus_for(pool)
        return NodeSpec(labels=dict(pool.labels), num_cpus=room(pool), num_gpus=gpus)

    head = NodeSpec(labels={"role": "head"}, num_cpus=_SPARE_CPUS + room(settings.ingress))
    return [head, *map(node, settings.pools.values())]


def _gpus_for(pool: PoolSettings) -> int:
    """GPUs on which all replicas of a pool find room: several share one, or each has its own."""
    if pool.num_gpus >= 1:
        return pool.replicas.maximum * ceil(pool.num_gpus)
    return ceil(pool.replicas.maximum / floor(1 / pool.num_gpus)) if pool.num_gpus else 0


def _introduction(service: RunningService) -> Iterator[str]:
    settings = service.settings
    for pool, replicas in service.health.get("pools", {}).items():
        for replica in replicas:
            pages = f", KV pages {_mb(replica['kv_bytes'])}" if replica["kv_bytes"] else ""
            parameters = _mb(replica["parameter_bytes"])
            yield f"{pool} on node {replica['node'][:12]}: parameters {parameters}{pages}"
    yield (
        f"KV pages: up to --max-num-seqs {settings.max_num_seqs} sequences per decode replica, "
        f"{service.kv_bytes:,} bytes each replica, which hold {service.kv_tokens:,} tokens"
    )
    if settings.short_prompt_tokens:
        obstacle = short_way_obstacle(settings)
        yield (
            f"prompts of up to {settings.short_prompt_tokens} tokens are prefilled by decode "
            "replicas where that is sooner"
            if obstacle is None
            else f"all prompts are prefilled apart: {obstacle}"
        )
    yield f"ready: {settings.model_name} at {service.url}/v1"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB"
