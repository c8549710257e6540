"""Local clusters: several real Ray nodes on one machine, for the demo, ``rayapp serve`` and tests.

Every node has its own raylet, object store and address (127.0.0.2, .3, ...; never 127.0.0.1, which
Ray rewrites), so data between nodes really travels. The context ends every process that it started.
If this process is killed, Ray's reaper ends the nodes at once, and their agents follow within
minutes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from rayapp.errors import ClusterError

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    # Without this setting, processes disagree as soon as a token file exists in the home directory.
    "RAY_AUTH_MODE": "disabled",
    # Workers share few cores, so their threads must not spin while they wait.
    "OMP_NUM_THREADS": "1",
    # Ray's default of 15 starves replicas beside anything else that computes on this machine.
    "RAY_worker_niceness": "0",
    # Serve kills a proxy that is not ready after three times its default of 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "HF_HUB_OFFLINE": "1",
}
_MAX_NODES = 200
_MIB = 1 << 20
_STOP_TRIES = 5


@dataclass(frozen=True)
class NodeSpec:
    """Specification of a node: its labels and resources. A CPU is logical: a place for one task."""

    labels: Mapping[str, str] = field(default_factory=dict)
    num_cpus: int = 4
    num_gpus: int = 0
    object_store_bytes: int = 200 * _MIB


@dataclass
class LocalCluster:
    """A running local cluster.

    Args:
        address: The address to which drivers connect.
        dashboard_url: The URL to which jobs are submitted, None without a dashboard.
        nodes: Ray's node objects, in the order of their specifications.
    """

    address: str
    dashboard_url: str | None
    nodes: list[Any]
    _cluster: Any

    def add_node(self, spec: NodeSpec) -> str:
        """Start one more node, and return its id."""
        arguments = _node_arguments(spec, len(self.nodes))
        node = self._cluster.add_node(**arguments)
        self.nodes.append(node)
        return str(node.node_id)

    def kill_node(self, node_id: str) -> None:
        """End every process of a node at once."""
        node = next(node for node in self.nodes if node.node_id == node_id)
        self._cluster.remove_node(node, allow_graceful=False)


STAGE_NODES = (
    NodeSpec(labels={"role": "head"}),
    NodeSpec(labels={"role": "prefill"}),
    NodeSpec(labels={"role": "decode"}),
)


@contextmanager
def local_cluster(
    nodes: Sequence[NodeSpec] = STAGE_NODES, *, dashboard_port: int | None = None
) -> Iterator[LocalCluster]:
    """Start a cluster of ``nodes``, the first of them the head, that ends with the context.

    This process is not connected to it: use ``ray.init(cluster.address)``, and disconnect before
    the context ends (which disconnects otherwise).

    Args:
        nodes: The specifications of the nodes.
        dashboard_port: Port of the dashboard, which takes job submissions; None starts none.

    Raises:
        ClusterError: The nodes did not start.
    """
    os.environ.update(ENVIRONMENT)
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.WARNING)
    cluster = Cluster(shutdown_at_exit=True)
    try:
        local = _start(cluster, nodes, dashboard_port)
        yield local
    finally:
        _stop(cluster)


def _start(cluster: Any, nodes: Sequence[NodeSpec], dashboard_port: int | None) -> LocalCluster:
    with_dashboard: dict[str, Any] = {"include_dashboard": dashboard_port is not None}
    if dashboard_port is not None:
        with_dashboard |= {"dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
    started = []
    try:
        for number, spec in enumerate(nodes):
            extra = with_dashboard if number == 0 else {}
            started.append(cluster.add_node(**_node_arguments(spec, number), **extra))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"node {len(started) + 1} of {len(nodes)} of the local cluster did not start "
            f"({reason}); look at Ray's logs, or try again once this machine is less busy"
        ) from error
    url = None if dashboard_port is None else f"http://127.0.0.1:{dashboard_port}"
    logger.info("local cluster of %d nodes at %s", len(started), cluster.address)
    return LocalCluster(cluster.address, url, started, cluster)


def _node_arguments(spec: NodeSpec, number: int) -> dict[str, Any]:
    if number >= _MAX_NODES:
        raise ClusterError(f"a local cluster has at most {_MAX_NODES} nodes")
    return {
        "num_cpus": spec.num_cpus,
        "num_gpus": spec.num_gpus,
        "labels": dict(spec.labels),
        "object_store_memory": spec.object_store_bytes,
        "node_ip_address": f"127.0.0.{number + 2}",
        "dashboard_agent_listen_port": None,
    }


def _stop(cluster: Any) -> None:
    import ray

    for _ in range(_STOP_TRIES):
        with suppress(Exception):
            ray.shutdown()
        if cluster.head_node is None:
            return
        # A thread of Serve's that reports metrics connects this process again, whenever it likes.
        with suppress(ValueError):
            cluster.shutdown()
            return
