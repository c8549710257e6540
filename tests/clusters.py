"""The local cluster of a test run: three nodes for all tests, and a look inside its services."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rayapp.distributed.cluster.local import LocalCluster, local_cluster
from rayapp.distributed.serve.settings import APP_NAME, ServiceSettings


@dataclass
class Deployed:
    """A service under test, and how to look inside."""

    settings: ServiceSettings
    health: dict[str, Any]
    client: httpx.Client

    @property
    def num_slots(self) -> int:
        """The sequences that all its decode replicas run at once."""
        pools = self.settings.pools
        holder = pools.get("decode") or pools["unified"]
        return self.settings.max_num_seqs * holder.replicas.minimum

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
            found = response.results(timeout_s=60, return_exceptions=True)
            counts[name] = [held for held in found if not isinstance(held, ActorDiedError)]
            for held in counts[name]:
                if isinstance(held, Exception):
                    raise held
        return counts

    def check_idle(self, within_s: float = 60.0, replaced_within_s: float = 120.0) -> None:
        """Idle means zero, everywhere; a pool whose replicas were killed gets time to return.

        A busy machine may be slow to free what a client left, but a lease that leaked lasts longer
        than this waits (``LEASE_S`` of :mod:`tests.services`).
        """
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
    def stopped(self, *pids: int) -> Iterator[None]:
        """The processes do nothing meanwhile, and nobody is told."""
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in filter(psutil.pid_exists, pids):
                os.kill(pid, signal.SIGCONT)

    def wait_whole(self) -> None:
        """Wait until every pool has its smallest size, which a test may have made smaller."""
        for name, pool in self.settings.pools.items():
            self.wait_for(name, {pool.replicas.minimum})

    def wait_for(self, deployment: str, counts: set[int], within_s: float = 120.0) -> None:
        """Wait until the pool has one of these numbers of replicas."""
        until = time.monotonic() + within_s
        while len(self.replicas(deployment)) not in counts:
            assert time.monotonic() < until, self.replicas(deployment)
            time.sleep(0.2)


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the Hub that all nodes of the cluster look into; empty to begin with."""
    return tmp_path_factory.mktemp("hub-cache")


@pytest.fixture(scope="session")
def cluster(hub_cache: Path) -> Iterator[LocalCluster]:
    """The one cluster of a test run, with this process connected to it until the run ends.

    Tests that need it come last (:mod:`tests.order`), so that no other one is connected.
    """
    import ray

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("HF_HUB_CACHE", str(hub_cache))
            running = stack.enter_context(local_cluster())
        ray.init(running.address, log_to_driver=False, logging_level="error")
        stack.callback(ray.shutdown)
        yield running
