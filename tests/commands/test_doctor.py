"""The doctor's findings on this machine, on a cluster, and on broken parts."""

from __future__ import annotations

import socket
import time

import pytest
import ray

from rayapp import cli
from rayapp.distributed.cluster.connection import connected
from rayapp.distributed.cluster.local import NodeSpec, local_cluster
from rayapp.errors import ClusterError
from rayapp.models.loading import read_signature
from rayapp.plan import PruningPlan
from rayapp.workflows import doctor


@pytest.fixture
def dead_address():
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_a_dead_address_is_refused_at_once(dead_address):
    started = time.monotonic()
    with (
        pytest.raises(ClusterError, match=f"no Ray cluster at {dead_address}.*or leave it"),
        connected(dead_address, otherwise="leave it"),
    ):
        pass
    assert time.monotonic() - started < 10
    assert not ray.is_initialized()


def test_one_broken_check_does_not_hide_the_others(dead_address, save_tiny, tmp_path):
    model = save_tiny(tmp_path, "llama")
    signature = read_signature(model)
    other = signature.model_copy(update={"weights_fingerprint": "v2:" + "0" * 21})
    plan = PruningPlan.model_validate({"model": other, "decode": {"blocks": {1: "removed"}}})
    found = by_name(doctor.examine(model, plan.save(tmp_path / "plan"), dead_address))
    assert found["packages"].status == "ok"
    assert found["shipped model"].status == "ok"
    assert found["model"].status == "failed"
    assert "PlanError" in found["model"].found
    assert found["ray"].status == "failed"
    assert dead_address in found["ray"].found


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ["torch>=999", "no-such-package>=1", 'x; extra=="y"']
    )
    (finding,) = doctor._packages()
    assert finding.status == "failed"
    assert "torch" in finding.found
    assert ">=999" in finding.found
    assert "no-such-package is missing" in finding.found
    assert "constraints" in finding.remedy


def test_a_healthy_model_answers(monkeypatch):
    (finding,) = doctor._shipped_model()
    assert finding.status == "ok"
    monkeypatch.setattr(
        doctor.LocalPipeline, "generate", lambda *_: [type("Wrong", (), {"text": "wrong"})]
    )
    (finding,) = doctor._shipped_model()
    assert finding.status == "failed"
    assert "install again" in finding.remedy


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_is_tried(monkeypatch):
    nodes = [NodeSpec(labels={"role": "prefill"}, num_cpus=1), NodeSpec(num_cpus=1)]
    with local_cluster(nodes) as cluster:
        found = by_name(doctor._cluster(cluster.address))
    assert found["ray"].status == "ok"
    assert "2 nodes" in found["ray"].found
    assert found["roles"].status == "warning"
    assert "1 for prefill, 0 for decode" in found["roles"].found
    assert found["transfer"].status == "ok", found["transfer"].found
    assert "8.4 MB" in found["transfer"].found


def test_the_exit_code_says_it(monkeypatch, capsys, dead_address):
    monkeypatch.setattr("sys.argv", ["rayapp", "doctor", "--address", dead_address])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("failed  ray") and dead_address in line for line in lines)
