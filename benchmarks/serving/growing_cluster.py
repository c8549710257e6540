"""A local cluster whose nodes come and go by Ray's autoscaler, as the machines of a cloud do.

The autoscaler is Ray's own, second version, with its provider for tests: a new node is a raylet on
this machine, with an address of its own. Ray ships a cluster like this, but it lacks a file, and
ends all clusters of the machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from rayapp.distributed.cluster.local import ENVIRONMENT
from rayapp.distributed.cluster.ports import free_port

_HEAD_ADDRESS = "127.0.1.2"
_STORE_BYTES = 100 << 20
_BENCHMARKS = Path(__file__).parents[1]
_EMPTY = {
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{
        name: []
        for name in (
            *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"),
            *("setup_commands", "head_setup_commands", "worker_setup_commands"),
            *("head_start_ray_commands", "worker_start_ray_commands"),
        )
    },
    "file_mounts_sync_continuously": False,
}


@dataclass(frozen=True)
class NodeType:
    """A type of nodes: its labels, the CPUs of a node, and how many there may be."""

    labels: Mapping[str, str] = field(default_factory=dict)
    num_cpus: int = 1
    fewest: int = 0
    most: int = 4


class LocalNodes(FakeMultiNodeProvider):
    """Starts nodes on this machine for the autoscaler, each at an address of its own."""

    def _create_node_with_resources_and_labels(
        self,
        node_config: Any,
        tags: Mapping[str, str],
        count: int,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
    ) -> None:
        del node_config, count
        with self.lock:
            name = self._next_hex_node_id()
            kind = tags[TAG_RAY_USER_NODE_TYPE]
            params = RayParams(
                min_worker_port=0,
                max_worker_port=0,
                node_manager_port=0,
                dashboard_agent_listen_port=0,
                include_log_monitor=False,
                num_cpus=resources.get("CPU", 0),
                num_gpus=0,
                object_store_memory=_STORE_BYTES,
                labels=dict(labels),
                node_ip_address=f"127.0.1.{2 + self._next_node_id}",
                redis_address=self._gcs_address,
                gcs_address=self._gcs_address,
                env_vars=_identity(name, kind),
            )
            node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
            known = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: kind,
                TAG_RAY_NODE_NAME: name,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[name] = {"tags": {**known, **tags}, "node": node}


def _identity(name: str, kind: str) -> dict[str, str]:
    """The variables by which the autoscaler knows a node that has joined."""
    return {
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": name,
        "RAY_CLOUD_INSTANCE_ID": name,
        "RAY_NODE_TYPE_NAME": kind,
    }


@dataclass
class GrowingCluster:
    """A running cluster, and the process that starts its nodes."""

    address: str
    _monitor: psutil.Process

    def count(self, role: str) -> int:
        """Number of nodes that live and carry the label ``role``."""
        return sum(
            node["Alive"] and (node.get("Labels") or {}).get("role") == role for node in ray.nodes()
        )

    def take(self, node_id: str) -> None:
        """Take a node away: all its processes end at once."""
        (address,) = (n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node_id)
        (raylet,) = (
            process
            for process in self._monitor.children()
            if any(word.endswith(f"={address}") for word in process.cmdline())
        )
        _end([*raylet.children(recursive=True), raylet])


@contextmanager
def growing_cluster(
    types: Mapping[str, NodeType], *, head_cpus: int = 2, idle_s: float = 6.0
) -> Iterator[GrowingCluster]:
    """Start a cluster of a head, whose other nodes the autoscaler starts and ends.

    It ends with the context, and so do its nodes. This process is not connected to it.

    Args:
        types: The types of nodes by name.
        head_cpus: CPUs of the head, which carries the label ``role=head``.
        idle_s: Seconds after which an idle node goes.
    """
    from ray.cluster_utils import Cluster

    port = free_port(_HEAD_ADDRESS)
    with ExitStack() as stack:
        config = Path(stack.enter_context(TemporaryDirectory())) / "autoscaling.json"
        address = f"{_HEAD_ADDRESS}:{port}"
        config.write_text(json.dumps(_configuration(types, head_cpus, idle_s, address)))
        cluster = Cluster(shutdown_at_exit=True)
        with _environment():
            head = cluster.add_node(
                num_cpus=head_cpus,
                labels={"role": "head"},
                object_store_memory=_STORE_BYTES,
                node_ip_address=_HEAD_ADDRESS,
                gcs_server_port=port,
                include_dashboard=False,
                dashboard_agent_listen_port=None,
                autoscaling_config=str(config),
                env_vars=_identity(FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE),
            )
        (monitor,) = head.all_processes[ray_constants.PROCESS_TYPE_MONITOR]
        process = psutil.Process(monitor.process.pid)
        try:
            yield GrowingCluster(address, process)
        finally:
            _stop(cluster, process)


def _configuration(
    types: Mapping[str, NodeType], head_cpus: int, idle_s: float, address: str
) -> dict[str, Any]:
    nodes = {
        name: {
            "resources": {"CPU": one.num_cpus},
            "labels": dict(one.labels),
            "node_config": {},
            "min_workers": one.fewest,
            "max_workers": one.most,
        }
        for name, one in types.items()
    }
    head = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    return {
        **_EMPTY,
        "cluster_name": "growing",
        "max_workers": sum(one.most for one in types.values()),
        "upscaling_speed": 100,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": f"{__name__}.{LocalNodes.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "available_node_types": {**nodes, FAKE_HEAD_NODE_TYPE: head},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
    }


@contextmanager
def _environment() -> Iterator[None]:
    """The environment in which the head's processes start; it is this process's afterwards."""
    path = os.pathsep.join(filter(None, (str(_BENCHMARKS), os.environ.get("PYTHONPATH"))))
    before = dict(os.environ)
    os.environ.update(
        ENVIRONMENT,
        PYTHONPATH=path,
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
    )
    try:
        yield
    finally:
        for name in (
            *("PYTHONPATH", "RAY_FAKE_CLUSTER", "RAY_enable_autoscaler_v2"),
            "AUTOSCALER_UPDATE_INTERVAL_S",
        ):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def _stop(cluster: Any, monitor: psutil.Process) -> None:
    """End the nodes that the autoscaler started, and then the head."""
    started: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        monitor.suspend()  # It starts no other node meanwhile.
        started = monitor.children(recursive=True)
        monitor.kill()
    ray.shutdown()
    with suppress(ValueError):
        cluster.shutdown()
    _end(started)


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
