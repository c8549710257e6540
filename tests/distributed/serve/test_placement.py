"""Placement: what cannot be satisfied is said at once, with label and capacity."""

from __future__ import annotations

import time

import pytest

from rayapp.distributed.cluster.nodes import FreeNode
from rayapp.distributed.serve.placement import misfit
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import ClusterError, ModelError, PlanError


def node(role, cpus, gpus=0.0):
    labels = {"role": role} if role else {}
    return FreeNode(role or "plain", f"10.0.0.{role}", labels, {"CPU": cpus, "GPU": gpus})


def settings_of(**options):
    return ServiceSettings.parse({"model": "/m", **options})


def test_what_fits_is_no_problem():
    assert misfit(settings_of(), [node("prefill", 1), node("decode", 1), node("", 1)]) is None
    assert misfit(settings_of(), [node("prefill", 2), node("decode", 1)]) is None
    assert misfit(settings_of(mode="unified"), [node("", 2)]) is None


def test_a_label_that_no_node_carries_is_named():
    problem = misfit(settings_of(), [node("prefill", 4), node("", 4)])
    assert "decode needs 1 replicas of 1 CPU" in problem
    assert "labelled role=decode, and no node of the cluster carries that label" in problem


def test_capacity_counts_over_the_nodes_that_carry_the_label():
    wanted = settings_of(decode={"replicas": 3, "labels": {"role": "decode"}, "num_gpus": 1})
    problem = misfit(wanted, [node("prefill", 4), node("decode", 8, 1), node("decode", 8, 1)])
    assert "decode needs 3 replicas of 1 CPU and 1 GPU on nodes labelled role=decode" in problem
    assert "only 2 fit (10.0.0.decode: 8 CPU, 1 GPU free; 10.0.0.decode" in problem


def test_pools_do_not_share_what_is_free():
    problem = misfit(settings_of(), [node("prefill", 1), node("decode", 1)])
    assert problem.startswith("ingress needs 1 replicas of 1 CPU")


@pytest.mark.ray
def test_a_real_cluster_says_so_within_thirty_seconds(deploy, save_tiny, tmp_path):
    path = str(save_tiny(tmp_path, "llama"))
    asked = [
        ({"decode": {"labels": {"role": "moon"}}}, "labelled role=moon, and no node"),
        ({"prefill": {"replicas": 50, "labels": {"role": "prefill"}}}, "only 4 fit"),
        ({"prefill": {"num_gpus": 1, "labels": {"role": "prefill"}}}, "0 GPU free"),
    ]
    for options, message in asked:
        began = time.monotonic()
        with pytest.raises(ClusterError, match=message), deploy(model=path, **options):
            pass
        assert time.monotonic() - began < 30


@pytest.mark.ray
def test_a_node_that_cannot_read_is_named(cluster, save_tiny, tmp_path, monkeypatch):
    """The driver reads the model under a name that no worker knows."""
    from rayapp.distributed.serve.placement import check_readable

    settings = settings_of(model=str(tmp_path / "nowhere"))
    began = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        check_readable(settings)
    assert time.monotonic() - began < 30
    for address, role in (("127.0.0.3", "prefill"), ("127.0.0.4", "decode")):
        assert f"node {address} (role={role})" in str(caught.value)
    assert "nowhere" in str(caught.value)


@pytest.mark.ray
def test_bad_models_and_plans_are_the_users_input(deploy, save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    with pytest.raises(ModelError), deploy(model=str(tmp_path / "missing")):
        pass
    plan = tmp_path / "plan.json"
    plan.write_text('{"prefill": {"blocks": {"0": "removed"}}}')
    with pytest.raises(PlanError), deploy(model=str(path), plan=str(plan)):
        pass
