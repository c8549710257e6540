"""Deployment of a service: put it on a cluster, wait until it answers, and take it off again.

The configuration is declarative: the service equals the one that ``serve deploy`` would run from
the same file, and applying it again changes only the parts that differ.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client, _set_global_client
from ray.serve.schema import ServeDeploySchema

from rayapp.distributed.cluster.connection import connected, hushed
from rayapp.distributed.cluster.nodes import free_nodes
from rayapp.distributed.cluster.patience import Patience
from rayapp.distributed.serve import decisions
from rayapp.distributed.serve.autoscaling import POLICY
from rayapp.distributed.serve.placement import (
    check_placement,
    check_readable,
    demand_of,
    hopeless,
)
from rayapp.distributed.serve.replicas.stage import image_support
from rayapp.distributed.serve.settings import APP_NAME, ServiceSettings
from rayapp.engine.prefill import check_prunable
from rayapp.errors import ClusterError
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.healed import HealedWeights
from rayapp.models.hub import locate
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import PruningPlan
from rayapp.vision.selection import check_rule

logger = logging.getLogger(__name__)
IMPORT_PATH = "rayapp.distributed.serve.app:build"
READY_LIMIT_S = 1800.0
"""How long replicas may take to read their weights, from far away too (project default)."""
_POLL_S = 0.2
_SHUTDOWN_S = 8.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(frozen=True)
class RunningService:
    """A service that answers.

    Args:
        settings: The settings of the service.
        health: The body of ``/health`` when it became ready.
    """

    settings: ServiceSettings
    health: Mapping[str, Any]

    @property
    def url(self) -> str:
        """The URL at which it answers."""
        return self.settings.url

    @property
    def kv_bytes(self) -> int:
        """Number of bytes that a decode replica sets aside for KV."""
        return self._most("kv_bytes")

    @property
    def kv_tokens(self) -> int:
        """Number of tokens whose KV they hold."""
        return self._most("kv_tokens")

    def _most(self, name: str) -> int:
        pools = self.health.get("pools", {})
        return max((r.get(name, 0) for replicas in pools.values() for r in replicas), default=0)


def resolved(settings: ServiceSettings) -> ServiceSettings:
    """Resolve paths so that they mean the same in every process; model and plan are checked here.

    Raises:
        ModelError: The model cannot be used.
        PlanError: The plan cannot be used, or was made for another model.
    """
    where = locate(settings.model, settings.revision)
    checkpoint = Checkpoint(where.directory)
    signature = checkpoint.signature()
    load_tokenizer(where.directory)
    takes_images = image_support(settings, where.directory, checkpoint.config) is not None
    if settings.plan is not None:
        plan = PruningPlan.load(settings.plan)
        plan.check_model(signature)
        if plan.visual_tokens is not None:
            check_rule(plan.visual_tokens)
            check_prunable(takes_images=takes_images)
        if plan.healed:
            HealedWeights.load(plan, ())
    paths = {
        "model": where.pinned,
        "revision": None,
        "plan": None if settings.plan is None else _absolute(settings.plan),
        "ledger_dir": None if settings.ledger_dir is None else _absolute(settings.ledger_dir),
        "served_model_name": settings.model_name,
    }
    return settings.model_copy(update=paths)


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def configuration(settings: ServiceSettings) -> dict[str, Any]:
    """Make the Serve configuration of a service, as it would stand in a file.

    Serve logs the arguments of an application, so they have the digest of the key, never the key.
    """
    is_elastic = any(pool.replicas.is_elastic for pool in settings.pools.values())
    deployed = settings.model_copy(update={"api_key": None, "api_key_digest": settings.key_digest})
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": settings.host, "port": settings.port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": deployed.model_dump(mode="json", exclude_none=True),
                **({"autoscaling_policy": {"policy_function": POLICY}} if is_elastic else {}),
            }
        ],
    }


Configured = Callable[[ServiceSettings], Mapping[str, Any]]
"""Makes the Serve configuration of a service."""


@contextmanager
def running_service(
    settings: ServiceSettings,
    *,
    address: str | None = None,
    ready_s: float = READY_LIMIT_S,
    configured: Configured = configuration,
) -> Iterator[RunningService]:
    """Run a service, which answers for as long as the context lasts.

    Args:
        settings: What to serve.
        address: Address of the cluster; None uses the connection that this process has.
        ready_s: How long every pool together may take to answer, once placement is checked; where
            replicas fail or nodes are lost, it is not waited for.
        configured: Makes the configuration of the resolved settings.

    Raises:
        ModelError: The model cannot be used.
        PlanError: The plan cannot be used.
        ClusterError: The cluster cannot be reached, cannot place the pools, cannot read the files,
            or the replicas do not start.
    """
    settings = resolved(settings)
    with connected(address or "auto", otherwise="leave --address out for a local one"):
        check_placement(settings)
        check_readable(settings)
        try:
            apply(settings, configured)
            yield RunningService(settings, _wait_ready(settings, ready_s))
        finally:
            _take_off()


def apply(settings: ServiceSettings, configured: Configured = configuration) -> None:
    """Start Serve if it is not running, and deploy or update the service.

    Args:
        settings: What to serve.
        configured: Makes the configuration.

    Raises:
        ClusterError: Serve cannot listen on the port, or it listens on another one already.
    """
    config = configured(settings)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location=config["proxy_location"], http_options=config["http_options"])
    except (RayError, TimeoutError) as error:
        if "Failed to bind" in str(error):
            raise ClusterError(
                f"the cluster's head node cannot listen on {settings.host}:{settings.port}: "
                "another process does, or the address is another machine's; choose another --port "
                "or --host"
            ) from None
        # Serve brings up another proxy by itself, which is waited for with the replicas.
        logger.warning("Serve's proxy is slow to start (%s); going on", type(error).__name__)
    client = _get_global_client()
    running = client.http_config
    if (running.host, running.port) != (settings.host, settings.port):
        raise ClusterError(
            f"Serve runs on this cluster and listens on {running.host}:{running.port}; serve "
            f"there, not on {settings.host}:{settings.port}, or run `serve shutdown` first"
        )
    decisions.clear()
    client.deploy_apps(ServeDeploySchema.model_validate(config))


def _wait_ready(settings: ServiceSettings, ready_s: float) -> dict[str, Any]:
    """The body of ``/health`` once it says that every pool answers.

    Nodes that were idle too long while Serve started are asked for once more.
    """
    patience, reason = Patience(limit_s=ready_s), "the ingress does not answer yet"
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    with demand_of(settings) as demand:
        while True:
            _check_status()
            with suppress(httpx.HTTPError, ValueError):
                answer = httpx.get(f"{settings.url}/health", headers=headers, timeout=10.0)
                body = answer.json()
                if answer.status_code == 200:
                    return dict(body)
                reason = body.get("reason", reason) if isinstance(body, dict) else reason
            if patience.is_due:
                never = hopeless(settings, free_nodes())
                if never is not None:
                    demand.show()
                patience.go_on(f"{reason}; see `serve status` and the replicas' logs", never=never)
            time.sleep(_POLL_S)
            demand.settle()


def _check_status() -> None:
    """Raise :class:`ClusterError` if Serve has given up."""
    application = serve.status().applications.get(APP_NAME)
    if application is None or str(application.status.value) not in _FAILED:
        return
    reasons = [application.message, *(d.message for d in application.deployments.values())]
    lines = [line.strip() for reason in reasons for line in reason.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line] or lines or ["no reason given"]
    raise ClusterError(f"the replicas do not start: {telling[-1]}")


def _take_off() -> None:
    """End the service, in time even if streams run; a cluster that has gone needs no call."""
    with suppress(Exception), hushed():
        client = _get_global_client()
        details = client.get_serve_details()
        with suppress(Exception):
            client.shutdown(timeout_s=_SHUTDOWN_S)
        _set_global_client(None)
        for name in _actor_names(details):
            with suppress(Exception):
                ray.kill(ray.get_actor(name, namespace="serve"))


def _actor_names(details: dict[str, Any]) -> list[str]:
    """Names of the actors of all replicas, which outlive the process that deployed them."""
    return [
        str(replica["actor_name"])
        for application in details["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    ]
