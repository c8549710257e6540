"""The services of a test run: a few standard ones, which modules share, and others on demand.

Serve has one application at a time, with one controller and one proxy for the whole run. Whoever
asks for other settings gets the application updated in place, as an operator would update it;
:mod:`tests.order` puts those next to each other who ask for the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayapp.distributed.cluster.local import LocalCluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.settings import APP_NAME, ServiceSettings
from tests.clusters import Deployed

UPDATED_WITHIN_S = 280.0
KEY = "secret"
# Longer than anything waits for a service to be idle: no lease that leaked is freed in time.
LEASE_S = 120.0
TWO_OF_EACH = {
    "prefill": {"replicas": 2, "labels": {"role": "prefill"}},
    "decode": {"replicas": 2, "labels": {"role": "decode"}},
}


class Services:
    """The application of the shared cluster, and its present settings."""

    def __init__(self) -> None:
        self._port = free_port()
        self._now: Deployed | None = None

    def get(self, **options: Any) -> Deployed:
        """The service of these settings, all replicas of which run."""
        from rayapp.distributed.serve.deploy import apply, resolved

        settings = resolved(
            ServiceSettings.parse(
                {
                    "dtype": "float32",
                    "port": self._port,
                    "served_model_name": "tested",
                    "ingress": {"labels": {"role": "head"}},
                    **options,
                }
            )
        )
        if self._now is None or self._now.settings != settings:
            self.close()
            apply(settings)
            self._now = _ready(settings)
        self._now.wait_whole()
        return self._now

    def close(self) -> None:
        """Close the connections; the application ends with the cluster."""
        if self._now is not None:
            self._now.client.close()
        self._now = None


def _ready(settings: ServiceSettings) -> Deployed:
    """The service once nothing of the one before it answers any more."""
    from ray import serve

    from rayapp.distributed.serve.deploy import _check_status

    key = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    client = httpx.Client(base_url=settings.url, timeout=120.0, headers=key)
    until_s = time.monotonic() + UPDATED_WITHIN_S
    while True:
        _check_status()
        status = serve.status().applications[APP_NAME]
        if status.status.value == "RUNNING":
            with suppress(httpx.TransportError):  # a proxy may still be on its way
                health = client.get("/health")
                if health.status_code == 200:
                    return Deployed(settings, health.json(), client)
        assert time.monotonic() < until_s, status
        time.sleep(0.1)


@pytest.fixture(scope="session")
def services(cluster: LocalCluster) -> Iterator[Services]:
    """The one application of the shared cluster."""
    running = Services()
    yield running
    running.close()


@pytest.fixture(scope="session")
def deploy(services: Services) -> Callable[..., Any]:
    """``with deploy(model=..., ...) as deployed``; the settings of ``ServiceSettings``."""

    @contextmanager
    def deployed(**options: Any) -> Iterator[Deployed]:
        yield services.get(**options)

    return deployed


@pytest.fixture(scope="session")
def tiny_llama(save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that most services serve."""
    return save_tiny(tmp_path_factory.mktemp("served"), "llama")


@pytest.fixture(scope="module")
def standard(services: Services, tiny_llama: Path) -> Deployed:
    """The dense model, two replicas for each stage, on nodes of their own."""
    return services.get(
        model=str(tiny_llama),
        max_num_seqs=4,
        max_waiting=40,
        max_num_batched_tokens=128,
        kv_part_ms=0.0,  # KV leaves as it is made, as it does of long prompts.
        max_node_kv_bytes="1GiB",  # It is counted, and nobody waits.
        api_key=KEY,
        deadlines={"lease_s": LEASE_S},
        **TWO_OF_EACH,
    )
