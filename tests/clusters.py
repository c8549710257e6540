"""A local cluster of three nodes per module, and services on it."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from rayapp.distributed.cluster.local import LocalCluster, local_cluster
from rayapp.distributed.serve.settings import APP_NAME, ServiceSettings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Deployed:
    """A service under test, and how to look inside."""

    settings: ServiceSettings
    health: dict[str, Any]
    client: httpx.Client

    def complete(self, prompt: Any, **options: Any) -> httpx.Response:
        body = {"model": self.settings.model_name, "prompt": prompt, "temperature": 0, **options}
        return self.client.post("/v1/completions", json=body)

    def handle(self, deployment: str) -> Any:
        from ray import serve

        return serve.get_deployment_handle(deployment, APP_NAME)

    def counts(self) -> dict[str, list[dict[str, int]]]:
        """What every replica holds, checked by the replica itself."""
        from ray.exceptions import ActorDiedError

        counts = {}
        for name in ("ingress", *self.settings.pools):
            response = self.handle(name).broadcast("check_integrity")
            found = response.results(timeout_s=20, return_exceptions=True)
            counts[name] = [held for held in found if not isinstance(held, ActorDiedError)]
            for held in counts[name]:
                if isinstance(held, Exception):
                    raise held
        return counts

    def check_idle(self, within_s: float = 15.0, replaced_within_s: float = 60.0) -> None:
        """Idle means zero, everywhere; a pool whose replicas were killed gets time to return."""
        from ray.serve.exceptions import DeploymentUnavailableError

        began = time.monotonic()
        while True:
            try:
                counts, limit_s = self.counts(), within_s
            except DeploymentUnavailableError as error:
                counts, limit_s = {"unavailable": [{str(error): 1}]}, replaced_within_s
            held = {n: c for n, found in counts.items() for c in found if any(c.values())}
            if not held:
                return
            if time.monotonic() > began + limit_s:
                raise AssertionError(f"still held: {held}")
            time.sleep(0.1)

    def replicas(self, deployment: str) -> dict[str, int]:
        """Process id of every running replica, by replica id."""
        from ray.serve.context import _get_global_client

        details = _get_global_client().get_serve_details()
        found = details["applications"][APP_NAME]["deployments"][deployment]["replicas"]
        return {
            r["replica_id"]: r["pid"]
            for r in found
            if r["state"] == "RUNNING" and psutil.pid_exists(r["pid"])
        }

    @contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """The process does nothing meanwhile, and nobody is told."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)

    def wait_for(self, deployment: str, counts: set[int], within_s: float = 120.0) -> None:
        """Wait until the pool has one of these numbers of replicas."""
        until = time.monotonic() + within_s
        while len(self.replicas(deployment)) not in counts:
            assert time.monotonic() < until, self.replicas(deployment)
            time.sleep(0.2)


@pytest.fixture(scope="session")
def shared_nodes() -> Iterator[LocalCluster]:
    """The one cluster of a test run: three nodes, for all tests that do not break them."""
    with local_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(shared_nodes: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster, with this process connected to it for the time of a module."""
    import ray

    ray.init(shared_nodes.address, log_to_driver=False, logging_level="error")
    yield shared_nodes
    ray.shutdown()


@pytest.fixture
def own_cluster(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A cluster that a test may break, in place of the shared one while the test runs."""
    import ray

    ray.shutdown()
    with local_cluster() as running:
        ray.init(running.address, log_to_driver=False, logging_level="error")
        yield running
        ray.shutdown()
    ray.init(cluster.address, log_to_driver=False, logging_level="error")


@pytest.fixture(scope="module")
def deploy(cluster: LocalCluster) -> Callable[..., Any]:
    """``with deploy(model=..., ...) as deployed``; the settings of ``ServiceSettings``."""
    from rayapp.distributed.serve.deploy import running_service

    @contextmanager
    def deployed(**options: Any) -> Iterator[Deployed]:
        settings = ServiceSettings.parse(
            {
                "dtype": "float32",
                "port": free_port(),
                "served_model_name": "tested",
                "ingress": {"labels": {"role": "head"}},
                **options,
            }
        )
        with (
            running_service(settings) as running,
            httpx.Client(base_url=running.url, timeout=120.0) as client,
        ):
            yield Deployed(running.settings, dict(running.health), client)

    return deployed
