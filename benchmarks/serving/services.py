"""Our service on local nodes, as benchmarks run it, and a look at its replicas."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.serve.context import _get_global_client

from rayapp.distributed.cluster.local import local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import running_service
from rayapp.distributed.serve.settings import APP_NAME, ServiceSettings
from serving.client import Server


def settings_of(
    arguments: Namespace, mode: str, *, plan: Path | None = None, replicas: int = 1
) -> ServiceSettings:
    """The settings of a service on as many cores as the options of a script say.

    Args:
        arguments: Options: model, dtype, threads, max_model_len, max_num_seqs, requests.
        mode: Unified or disaggregated.
        plan: The plan; None serves the dense model.
        replicas: Replicas of every pool.
    """
    pool = {"num_cpus": arguments.threads, "replicas": replicas}
    return ServiceSettings.parse(
        {
            "model": str(arguments.model),
            "plan": str(plan.resolve()) if plan else None,
            "mode": mode,
            "dtype": arguments.dtype,
            "port": free_port(),
            "max_model_len": arguments.max_model_len,
            "max_num_seqs": arguments.max_num_seqs,
            "max_waiting": max(arguments.requests, 256),
            "ingress": {"labels": {"role": "head"}},
            "unified": pool,
            "prefill": {**pool, "labels": {"role": "prefill"}},
            "decode": {**pool, "labels": {"role": "decode"}},
        }
    )


@contextmanager
def served(settings: ServiceSettings, name: str) -> Iterator[Server]:
    """Our service on local nodes of its own, which end with the context."""
    try:
        with local_cluster() as cluster, running_service(settings, address=cluster.address) as at:
            yield Server(name, at.url, settings.model_name, is_ours=True)
    finally:
        ray.shutdown()


def replica_pids(pool: str) -> dict[str, int]:
    """Process ids of the running replicas of a pool, by replica."""
    details = _get_global_client().get_serve_details()
    replicas = details["applications"][APP_NAME]["deployments"][pool]["replicas"]
    return {
        replica["replica_id"]: replica["pid"]
        for replica in replicas
        if replica["state"] == "RUNNING" and psutil.pid_exists(replica["pid"])
    }


def held(pools: tuple[str, ...]) -> dict[str, int]:
    """What the replicas of some pools hold, all together, as they check it themselves."""
    sums: dict[str, int] = {}
    for pool in pools:
        response: Any = serve.get_deployment_handle(pool, APP_NAME).broadcast("check_integrity")
        for counts in response.results(timeout_s=60):
            for name, value in counts.items():
                sums[name] = sums.get(name, 0) + value
    return sums
