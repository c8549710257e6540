"""The Serve application: the only place that binds deployments.

A declarative configuration names ``build`` as its ``import_path``, and the settings as ``args``.
Replicas are placed by node label. Queues live in the replicas, where they are counted, so Serve's
own limits are higher than any number of requests that admission accepts.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from rayapp.distributed.serve.autoscaling import POLICY
from rayapp.distributed.serve.exposure import check_exposure, serving_host
from rayapp.distributed.serve.ingress.ingress import Ingress
from rayapp.distributed.serve.replicas.replicas import DecodeReplica, PrefillReplica, UnifiedReplica
from rayapp.distributed.serve.settings import (
    DECODE,
    INGRESS,
    PREFILL,
    UNIFIED,
    PoolSettings,
    ServiceSettings,
)

_SPARE_REQUESTS = 1000
_SERVERS = {PREFILL: PrefillReplica, DECODE: DecodeReplica, UNIFIED: UnifiedReplica}


def build(args: dict[str, Any]) -> Application:
    """Build the Serve application of one service.

    Args:
        args: The fields of :class:`ServiceSettings` as plain data.

    Raises:
        InputError: The settings break a rule, or leave the service open to strangers.
    """
    settings = ServiceSettings.parse(args)
    check_exposure(settings, serving_host())
    pools = {
        name: serve.deployment(
            _SERVERS[name], name=name, **deployment_options(settings, name, pool)
        ).bind(settings)
        for name, pool in settings.pools.items()
    }
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        **deployment_options(settings, INGRESS, settings.ingress),
    )
    return ingress.bind(settings, **pools)


def deployment_options(settings: ServiceSettings, name: str, pool: PoolSettings) -> dict[str, Any]:
    """Make Serve's options of one deployment."""
    limits = settings.deadlines
    options: dict[str, Any] = {
        "max_ongoing_requests": _SPARE_REQUESTS + settings.max_admitted,
        "ray_actor_options": {
            "num_cpus": pool.num_cpus,
            "num_gpus": pool.num_gpus,
            **({"label_selector": dict(pool.labels)} if pool.labels else {}),
        },
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        # Whoever is drained has time for the longest answer allowed, with all its attempts.
        "graceful_shutdown_timeout_s": settings.max_attempts * limits.longest_s,
    }
    if name != INGRESS:
        router = "rayapp.distributed.serve.ingress.router:AddressedRouter"
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=router,
            request_routing_stats_period_s=settings.scaling.interval_s,
        )
    if any(one.replicas.is_elastic for one in settings.pools.values()):
        options["autoscaling_config"] = _autoscaling(settings, name, pool)
    else:
        options["num_replicas"] = pool.replicas.minimum
    return options


def _autoscaling(settings: ServiceSettings, name: str, pool: PoolSettings) -> AutoscalingConfig:
    """Serve's configuration of a pool: bounds, and how often it reports; the policy has the rest.

    The ingress never scales: its ledger would leave with a replica.
    """
    bounds, scaling = pool.replicas, settings.scaling
    return AutoscalingConfig(
        min_replicas=bounds.minimum,
        max_replicas=bounds.minimum if name == INGRESS else bounds.maximum,
        initial_replicas=bounds.minimum,
        policy=AutoscalingPolicy(
            policy_function=POLICY, policy_kwargs={"scaling": scaling.model_dump(mode="json")}
        ),
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        look_back_period_s=max(2.0, 2 * scaling.interval_s),
        metrics_interval_s=scaling.interval_s,
    )
