"""The nodes of a cluster, what they have, and what is free on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get

_AUTOSCALER_KEY = "__autoscaling_status"


@dataclass
class FreeNode:
    """An alive node, what is free on it, and what it has in all."""

    node_id: str
    address: str
    labels: Mapping[str, str]
    free: dict[str, float]
    total: Mapping[str, float] = field(default_factory=dict)

    def carries(self, labels: Mapping[str, str]) -> bool:
        """True if the node has all the labels."""
        return all(self.labels.get(key) == value for key, value in labels.items())

    def take(self, *, num_cpus: float, num_gpus: float) -> bool:
        """Reserve the resources of one replica on this node; return False if they are not free."""
        needs = {"CPU": num_cpus, "GPU": num_gpus}
        if any(self.free.get(name, 0.0) < amount - 1e-9 for name, amount in needs.items()):
            return False
        for name, amount in needs.items():
            self.free[name] = self.free.get(name, 0.0) - amount
        return True

    def idle(self) -> FreeNode:
        """The node as it is when nothing runs there."""
        return replace(self, free=dict(self.total))


def free_nodes() -> list[FreeNode]:
    """Return the alive nodes of the cluster that this process is connected to."""
    available = ray._private.state.available_resources_per_node()
    return [
        FreeNode(
            node["NodeID"],
            node["NodeManagerAddress"],
            node.get("Labels") or {},
            dict(available.get(node["NodeID"], {})),
            dict(node.get("Resources") or {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def spelled(nodes: Sequence[FreeNode]) -> str:
    """What is free on every node, in words."""
    return "; ".join(
        f"{node.address}: {node.free.get('CPU', 0):g} CPU, {node.free.get('GPU', 0):g} GPU free"
        for node in nodes
    )


def nodes_on_their_way() -> bool:
    """Whether an autoscaler is launching nodes, by its own account; what it cannot say is no."""
    with suppress(Exception):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        if status.pending_launches or status.pending_nodes:
            return True
    with suppress(Exception):  # the autoscaler before that keeps its report in the cluster's table
        report = json.loads(_internal_kv_get(_AUTOSCALER_KEY))["autoscaler_report"]
        return bool(report["pending_launches"] or report["pending_nodes"])
    return False
