"""A service that is slow to become ready is waited for; one whose nodes are gone is not."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from rayapp.distributed.cluster import patience
from rayapp.distributed.cluster.nodes import FreeNode
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

    client = SimpleNamespace(deploy_apps=deployed.append)
    monkeypatch.setattr(deploy.serve, "start", start)
    monkeypatch.setattr(deploy, "_get_global_client", lambda: client)
    deploy.apply(SETTINGS)
    assert [application.name for application in deployed[0].applications] == ["rayapp"]
    assert f"proxy is slow to start ({type(error).__name__})" in caplog.text
