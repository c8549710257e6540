"""Placement: what cannot be satisfied is said at once, with label and capacity."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rayapp.distributed.cluster import patience
from rayapp.distributed.cluster.local import NodeSpec
from rayapp.distributed.cluster.nodes import FreeNode, free_nodes
from rayapp.distributed.serve import placement
from rayapp.distributed.serve.placement import check_placement, check_readable, misfit
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import ClusterError, ModelError, PlanError

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def node(role, cpus, gpus=0.0):
    labels = {"role": role} if role else {}
    has = {"CPU": cpus, "GPU": gpus}
    return FreeNode(role or "plain", f"10.0.0.{role}", labels, has, dict(has))


def taken(role, cpus):
    """A node whose CPUs others use."""
    return replace(node(role, cpus), free={"CPU": 0.0})


@pytest.fixture
def nodes(monkeypatch):
    """What the cluster tells of its nodes, time after time; the last for ever."""

    class Shown:
        """In place of a demand, which is shown on a real cluster below."""

        def __init__(self, bundles):
            self.bundles = bundles

        def __enter__(self):
            return self

        def __exit__(self, *_):
            shown.append("ended")

        def show(self):
            shown.append("shown")

        def settle(self):
            pass

    shown = []

    def told(*times, on_their_way=False):
        told_s, left = iter(times), []

        def next_time():
            left[:] = next(told_s, left)
            return [replace(each, free=dict(each.free)) for each in left]

        monkeypatch.setattr(placement, "free_nodes", next_time)
        monkeypatch.setattr(placement, "nodes_on_their_way", lambda: on_their_way)
        monkeypatch.setattr(placement, "Demand", Shown)
        return shown

    monkeypatch.setattr(placement, "_POLL_S", 0.01)
    monkeypatch.setattr(patience, "TELL_EVERY_S", 0.02)
    return told


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


def test_pools_wait_for_what_others_use_and_say_so(nodes, monkeypatch, caplog):
    monkeypatch.setattr(placement, "JOIN_S", 0.0)
    busy, free = [taken("prefill", 2), node("decode", 1)], [node("prefill", 2), node("decode", 1)]
    shown = nodes(*[busy] * 20, free)
    check_placement(settings_of())
    assert shown == ["ended"], "no node is missing"
    assert "prefill needs 1 replicas of 1 CPU" in caplog.text
    assert "only 0 fit (10.0.0.prefill: 0 CPU" in caplog.text


def test_pools_that_others_never_leave_room_for_give_up(nodes, monkeypatch):
    monkeypatch.setattr(placement, "BUSY_LIMIT_S", 0.2)
    nodes([taken("prefill", 2), node("decode", 1)])
    with pytest.raises(ClusterError, match=r"gave up after .* prefill needs 1 replicas"):
        check_placement(settings_of())


def test_pools_that_idle_nodes_cannot_hold_fail_soon(nodes, monkeypatch):
    monkeypatch.setattr(placement, "JOIN_S", 0.1)
    shown = nodes([node("prefill", 2), node("", 2)])
    with pytest.raises(ClusterError, match=r"^decode needs 1 replicas .* no node of the cluster"):
        check_placement(settings_of())
    assert shown[0] == "shown"
    assert shown[-1] == "ended"


def test_pools_wait_for_nodes_that_are_on_their_way(nodes, monkeypatch):
    monkeypatch.setattr(placement, "JOIN_S", 0.0)
    joined = [node("prefill", 2), node("decode", 1)]
    nodes(*[joined[:1]] * 20, joined, on_their_way=True)
    check_placement(settings_of())


@pytest.mark.ray
def test_a_real_cluster_says_so_within_thirty_seconds(cluster, tiny_llama, monkeypatch):
    from rayapp.distributed.serve.deploy import running_service

    asked = [
        ({"decode": {"labels": {"role": "moon"}}}, "labelled role=moon, and no node"),
        ({"prefill": {"replicas": 50, "labels": {"role": "prefill"}}}, "only 4 fit"),
        ({"prefill": {"num_gpus": 1, "labels": {"role": "prefill"}}}, "0 GPU free"),
    ]
    for options, message in asked:
        began = time.monotonic()
        settings = settings_of(model=str(tiny_llama), **options)
        with pytest.raises(ClusterError, match=message), running_service(settings):
            pass
        assert time.monotonic() - began < 30
        monkeypatch.setattr(placement, "JOIN_S", 1.0)  # the others need not take as long


@pytest.mark.ray
def test_a_node_that_cannot_read_is_named(cluster, tiny_llama, tmp_path):
    """All that have answered when the first one cannot, so the processes are started before."""
    check_readable(settings_of(model=str(tiny_llama)))
    settings = settings_of(model=str(tmp_path / "nowhere"))
    began = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        check_readable(settings)
    assert time.monotonic() - began < 30
    for address, role in (("127.0.0.3", "prefill"), ("127.0.0.4", "decode")):
        assert f"node {address} (role={role})" in str(caught.value)
    assert "nowhere" in str(caught.value)


# What nodes are asked in place of ``unreadable``; to ask it they import this file, so it is light.
def slow(model, plan):
    time.sleep(2.0)


def stuck(model, plan):
    time.sleep(600.0)


@pytest.mark.ray
def test_a_slow_node_is_waited_for_and_named(cluster, monkeypatch, caplog):
    monkeypatch.setattr(patience, "TELL_EVERY_S", 0.5)
    monkeypatch.setattr(placement, "unreadable", slow)
    check_readable(settings_of(model="/m"))
    assert "node 127.0.0.3 (role=prefill)" in caplog.text
    assert "has not said yet whether it can read" in caplog.text


@pytest.mark.ray
def test_a_node_that_never_answers_is_given_up(cluster, monkeypatch):
    monkeypatch.setattr(placement, "READ_LIMIT_S", 1.0)
    monkeypatch.setattr(patience, "TELL_EVERY_S", 0.5)
    monkeypatch.setattr(placement, "unreadable", stuck)
    with pytest.raises(ClusterError, match=r"gave up after .* node 127.0.0.4 .role=decode"):
        check_readable(settings_of(model="/m"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_that_was_scaled_to_zero_starts_the_nodes_that_pools_need(monkeypatch):
    """Only those types are started that can hold something, and nothing holds them afterwards."""
    import ray
    from ray.util.placement_group import placement_group_table

    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from serving.growing_cluster import NodeType, growing_cluster

    roles = ("prefill", "decode", "other")
    types = {role: NodeType({"role": role}, most=2) for role in roles}
    with growing_cluster(types, head_cpus=1, idle_s=60.0) as cluster:
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        assert [cluster.count(role) for role in roles] == [0, 0, 0]
        settings = settings_of(decode={"replicas": 2, "labels": {"role": "decode"}})
        check_placement(settings)
        assert [cluster.count(role) for role in roles] == [1, 2, 0]
        assert misfit(settings, free_nodes()) is None
        began = time.monotonic()
        with pytest.raises(ClusterError, match="labelled role=moon, and no node"):
            check_placement(settings_of(decode={"labels": {"role": "moon"}}))
        assert time.monotonic() - began < 30
        assert not [g for g in placement_group_table().values() if g["state"] != "REMOVED"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_that_dies_before_it_answers_is_named(cluster, monkeypatch):
    """At once, whatever other nodes still look at."""
    monkeypatch.setattr(patience, "TELL_EVERY_S", 0.5)
    monkeypatch.setattr(placement, "unreadable", stuck)
    labels = {"role": "dying"}
    dying = cluster.add_node(NodeSpec(labels=labels))
    (node,) = (node for node in free_nodes() if node.node_id == dying)
    killer = threading.Timer(2.0, cluster.kill_node, [dying])
    killer.start()
    began = time.monotonic()
    named = rf"node {node.address} .role=dying.: could not be asked"
    with pytest.raises(ClusterError, match=named):
        check_readable(settings_of(model="/m", decode={"labels": labels}))
    killer.join()
    assert time.monotonic() - began < 30
    while dying in {node.node_id for node in free_nodes()}:  # the tests after this have it not
        assert time.monotonic() - began < 120
        time.sleep(0.2)


@pytest.mark.ray
def test_bad_models_and_plans_are_the_users_input(cluster, tiny_llama, tmp_path):
    from rayapp.distributed.serve.deploy import running_service

    plan = tmp_path / "plan.json"
    plan.write_text('{"prefill": {"blocks": {"0": "removed"}}}')
    for error, settings in (
        (ModelError, settings_of(model=str(tmp_path / "missing"))),
        (PlanError, settings_of(model=str(tiny_llama), plan=str(plan))),
    ):
        with pytest.raises(error), running_service(settings):
            pass
