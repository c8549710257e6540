"""A service that is slow to become ready is waited for; one whose nodes are gone is not."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from rayapp.distributed.cluster import patience
from rayapp.distributed.cluster.nodes import FreeNode
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve import deploy, placement
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import ClusterError

SETTINGS = ServiceSettings.parse({"model": "/m"})
HAS = {"CPU": 2.0, "GPU": 0.0}
PREFILL, DECODE = (FreeNode(r, f"10.0.0.{r}", {"role": r}, {}, HAS) for r in ("prefill", "decode"))


@pytest.fixture
def service(monkeypatch):
    """A service on nodes that are all busy, ready at the given call of ``/health``."""

    def served(*nodes, ready_at):
        calls = iter(range(1, 1_000_000))

        def get(url, **_):
            ready = next(calls) >= ready_at
            reason = "no prefill replica answers"
            return httpx.Response(200 if ready else 503, json={"reason": reason, "ready": ready})

        monkeypatch.setattr(deploy.httpx, "get", get)
        monkeypatch.setattr(deploy, "free_nodes", lambda: list(nodes))

    monkeypatch.setattr(deploy, "_check_status", lambda: None)
    monkeypatch.setattr(deploy, "_POLL_S", 0.01)
    monkeypatch.setattr(placement, "nodes_on_their_way", lambda: False)
    monkeypatch.setattr(patience, "TELL_EVERY_S", 0.05)
    return served


def test_replicas_that_load_for_long_are_waited_for(service, caplog):
    service(PREFILL, DECODE, ready_at=30)
    assert deploy._wait_ready(SETTINGS, 60.0)["ready"]
    assert "no prefill replica answers; see `serve status`" in caplog.text


def test_a_pool_whose_node_is_gone_is_not_waited_for(service, monkeypatch):
    monkeypatch.setitem(patience.Patience.__init__.__kwdefaults__, "hopeless_s", 0.2)
    service(PREFILL, ready_at=1_000)
    with pytest.raises(ClusterError, match=r"^decode needs 1 replicas .* no node of the cluster"):
        deploy._wait_ready(SETTINGS, 60.0)


def test_the_wait_has_an_end(service):
    service(PREFILL, DECODE, ready_at=1_000)
    with pytest.raises(ClusterError, match=r"^gave up after .*: no prefill replica answers"):
        deploy._wait_ready(SETTINGS, 0.3)


@pytest.mark.parametrize("error", [ActorDiedError(), GetTimeoutError("60 s"), TimeoutError()])
def test_a_proxy_that_is_slow_to_start_does_not_end_the_deployment(monkeypatch, caplog, error):
    deployed = []

    def start(**_):
        raise error

    listens = SimpleNamespace(host=SETTINGS.host, port=SETTINGS.port)
    client = SimpleNamespace(deploy_apps=deployed.append, http_config=listens)
    monkeypatch.setattr(deploy.serve, "start", start)
    monkeypatch.setattr(deploy, "_get_global_client", lambda: client)
    deploy.apply(SETTINGS)
    assert [application.name for application in deployed[0].applications] == ["rayapp"]
    assert f"proxy is slow to start ({type(error).__name__})" in caplog.text


@pytest.mark.ray
def test_a_serve_that_listens_elsewhere_is_told_at_once(standard):
    settings = standard.settings.model_copy(update={"port": free_port()})
    listens = f"listens on 127.0.0.1:{standard.settings.port}"
    with pytest.raises(ClusterError, match=f"{listens}.* not on 127.0.0.1:{settings.port}"):
        deploy.apply(settings)


PORT_TAKEN = """
import socket
from rayapp.distributed.cluster.local import NodeSpec, local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import apply
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import ClusterError
port = free_port()
with socket.socket() as other, local_cluster([NodeSpec()]) as cluster:
    other.bind(("127.0.0.1", port))
    other.listen()
    import ray
    ray.init(cluster.address, log_to_driver=False)
    try:
        apply(ServiceSettings.parse({"model": "m", "port": port}))
    except ClusterError as error:
        print(error)
    ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow  # It needs a cluster of its own, on which Serve does not run.
def test_a_port_that_something_else_has_is_told_at_once():
    ended = subprocess.run(
        [sys.executable, "-c", PORT_TAKEN], capture_output=True, text=True, timeout=240, check=True
    )
    assert re.match(r"the cluster's head node cannot listen on 127.0.0.1:\d+: ", ended.stdout)
