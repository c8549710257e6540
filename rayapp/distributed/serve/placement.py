"""The check before a deployment whether a cluster has room and files for a service.

A label that no node carries, or a node that cannot read the model, would leave replicas pending or
restarting for ever without a word.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayapp.distributed.cluster.nodes import FreeNode, free_nodes
from rayapp.distributed.serve.probe import unreadable
from rayapp.distributed.serve.settings import INGRESS, PoolSettings, ServiceSettings
from rayapp.errors import ClusterError

_POLL_S = 0.5


def check_placement(settings: ServiceSettings, *, wait_s: float = 5.0) -> None:
    """Raise :class:`ClusterError` where a pool's smallest size does not fit on labelled nodes.

    Args:
        settings: The pools.
        wait_s: Nodes may still be joining: how long to wait for them.
    """
    until_s = time.monotonic() + wait_s
    while True:
        problem = misfit(settings, free_nodes())
        if problem is None:
            return
        if time.monotonic() > until_s:
            raise ClusterError(problem)
        time.sleep(_POLL_S)


def misfit(settings: ServiceSettings, nodes: list[FreeNode]) -> str | None:
    """The reason why the smallest pools do not fit, None if they do.

    Pools with the most particular needs are placed first.
    """
    pools = {**settings.pools, INGRESS: settings.ingress}
    for name, pool in sorted(pools.items(), key=lambda item: -len(item[1].labels)):
        labelled = [node for node in nodes if node.carries(pool.labels)]
        before = [dict(node.free) for node in labelled]
        for placed in range(pool.replicas.minimum):
            if not any(
                node.take(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus) for node in labelled
            ):
                return _explain(name, pool, placed, labelled, before)
    return None


def _explain(
    name: str,
    pool: PoolSettings,
    placed: int,
    labelled: list[FreeNode],
    before: list[dict[str, float]],
) -> str:
    label = ", ".join(f"{key}={value}" for key, value in pool.labels.items()) or "none needed"
    wanted = (
        f"{name} needs {pool.replicas.minimum} replicas of {pool.num_cpus:g} CPU and "
        f"{pool.num_gpus:g} GPU on nodes labelled {label}"
    )
    if not labelled:
        return (
            f"{wanted}, and no node of the cluster carries that label; start nodes with "
            f"`ray start --labels {label.replace(', ', ',')}`, or change the pool's labels"
        )
    capacity = "; ".join(
        f"{node.address}: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU free"
        for node, free in zip(labelled, before, strict=True)
    )
    return (
        f"{wanted}, but only {placed} fit ({capacity}); add nodes, ask for fewer replicas, or for "
        "less per replica"
    )


def check_readable(settings: ServiceSettings, *, within_s: float = 25.0) -> None:
    """Raise :class:`ClusterError` naming every candidate node that cannot read model or plan."""
    pools = (*settings.pools.values(), settings.ingress)
    nodes = [n for n in free_nodes() if any(n.carries(pool.labels) for pool in pools)]
    calls = {_probe(node, settings): node for node in nodes}
    done, silent = ray.wait(list(calls), num_returns=len(calls), timeout=within_s)
    problems = [_named(calls[call], f"did not answer within {within_s:g} s") for call in silent]
    problems += [
        _named(calls[call], problem) for call, problem in _results(done) if problem is not None
    ]
    if problems:
        raise ClusterError(
            "; ".join(problems) + ": put model and plan where every node can read them, under the "
            "same path"
        )


def _probe(node: FreeNode, settings: ServiceSettings) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    probe = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(unreadable)
    # Replicas read or fetch a model of the Hub themselves, because that takes its time.
    model = settings.model if Path(settings.model).is_absolute() else None
    return probe.remote(model, settings.plan)


def _results(calls: Iterable[Any]) -> Iterable[tuple[Any, str | None]]:
    for call in calls:
        try:
            yield call, ray.get(call)
        except ray.exceptions.RayError as error:
            yield call, f"could not be asked ({type(error).__name__})"


def _named(node: FreeNode, problem: str) -> str:
    labels = ", ".join(f"{k}={v}" for k, v in node.labels.items() if not k.startswith("ray.io/"))
    return f"node {node.address} ({labels or 'no labels'}): {problem}"
