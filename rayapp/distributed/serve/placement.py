"""The check before a deployment whether a cluster has room and files for a service.

A label that no node carries, or a node that cannot read the model, would leave replicas pending or
restarting for ever without a word.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayapp.distributed.cluster.demand import Bundle, Demand
from rayapp.distributed.cluster.nodes import FreeNode, free_nodes, nodes_on_their_way, spelled
from rayapp.distributed.cluster.patience import Patience
from rayapp.distributed.serve.probe import unreadable
from rayapp.distributed.serve.settings import INGRESS, PoolSettings, ServiceSettings
from rayapp.errors import ClusterError

BUSY_LIMIT_S = 300.0
"""How long what others have taken may take to become free (project default)."""
READ_LIMIT_S = 300.0
"""How long a node may take to look at model and plan, on a slow disk as well (project default)."""
JOIN_S = 15.0
"""How long nodes may take to join a cluster that cannot hold the pools yet, or its autoscaler to
begin to start some (project default); an autoscaler looks every five seconds."""
_POLL_S = 0.5
_REMEDY = "put model and plan where every node can read them, under the same path"


def check_placement(settings: ServiceSettings) -> None:
    """Wait until every pool's smallest size fits on labelled nodes.

    What is merely taken by others may become free, so that is waited for. Where nodes are missing,
    an autoscaler is shown what is needed, and nodes that it starts are waited for.

    Raises:
        ClusterError: The pools cannot fit, or did not within the limit.
    """
    patience = Patience(limit_s=BUSY_LIMIT_S, hopeless_s=JOIN_S)
    with demand_of(settings) as demand:
        while True:
            nodes = free_nodes()
            problem = misfit(settings, nodes)
            if problem is None:
                return
            never = hopeless(settings, nodes)
            if never is not None:
                demand.show()
            patience.go_on(problem, never=never)
            time.sleep(_POLL_S)
            demand.settle()


def demand_of(settings: ServiceSettings) -> Demand:
    """The demand of the replicas of the smallest pools."""
    return Demand(
        [
            Bundle(pool.num_cpus, pool.num_gpus, pool.labels)
            for pool in (*settings.pools.values(), settings.ingress)
            for _ in range(pool.replicas.minimum)
        ]
    )


def hopeless(settings: ServiceSettings, nodes: Sequence[FreeNode]) -> str | None:
    """Why the pools cannot fit, not even on idle nodes or those on their way; None if they can."""
    problem = misfit(settings, [node.idle() for node in nodes])
    return None if problem is None or nodes_on_their_way() else problem


def misfit(settings: ServiceSettings, nodes: list[FreeNode]) -> str | None:
    """The reason why the smallest pools do not fit, None if they do.

    Pools with the most particular needs are placed first.
    """
    pools = {**settings.pools, INGRESS: settings.ingress}
    for name, pool in sorted(pools.items(), key=lambda item: -len(item[1].labels)):
        labelled = [node for node in nodes if node.carries(pool.labels)]
        before = spelled(labelled)
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
    before: str,
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
    return (
        f"{wanted}, but only {placed} fit ({before}); add nodes, ask for fewer replicas, or for "
        "less per replica"
    )


def check_readable(settings: ServiceSettings) -> None:
    """Wait until every candidate node has said that it can read model and plan.

    Raises:
        ClusterError: Nodes that cannot, that died, or that gave no answer within the limit.
    """
    pools = (*settings.pools.values(), settings.ingress)
    nodes = [n for n in free_nodes() if any(n.carries(pool.labels) for pool in pools)]
    calls = {_probe(node, settings): node for node in nodes}
    patience, silent = Patience(limit_s=READ_LIMIT_S), list(calls)
    try:
        while silent:
            done, silent = ray.wait(silent, num_returns=len(silent), timeout=patience.pause_s)
            problems = [_named(calls[call], problem) for call, problem in _results(done) if problem]
            if problems:
                raise ClusterError(f"{'; '.join(problems)}: {_REMEDY}")
            if silent:
                slow = ", ".join(_title(calls[call]) for call in silent)
                patience.go_on(f"{slow}: has not said yet whether it can read model and plan")
    finally:
        for call in silent:
            ray.cancel(call, force=True)  # a file system that hangs would keep it for ever


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
    return f"{_title(node)}: {problem}"


def _title(node: FreeNode) -> str:
    labels = ", ".join(f"{k}={v}" for k, v in node.labels.items() if not k.startswith("ray.io/"))
    return f"node {node.address} ({labels or 'no labels'})"
