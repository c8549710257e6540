"""The nodes of a cluster and what is free on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray


@dataclass
class FreeNode:
    """An alive node and what is free on it."""

    node_id: str
    address: str
    labels: Mapping[str, str]
    free: dict[str, float]

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


def free_nodes() -> list[FreeNode]:
    """Return the alive nodes of the cluster that this process is connected to."""
    available = ray._private.state.available_resources_per_node()
    return [
        FreeNode(
            node["NodeID"],
            node["NodeManagerAddress"],
            node.get("Labels") or {},
            dict(available.get(node["NodeID"], {})),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
