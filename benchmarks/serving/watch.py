"""A look at a running service, again and again: its replicas, those it is to have, and nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Self

from ray.serve.context import _get_global_client

from rayapp.distributed.serve.settings import APP_NAME, DECODE, PREFILL
from rayapp.scaling.settings import Targets
from rayapp.simulation.outcome import Moment, Outcome
from rayapp.simulation.pool import Change
from rayapp.simulation.requests import Request

POOLS = (PREFILL, DECODE)


@dataclass(frozen=True)
class Sight:
    """The pools at one moment on the monotonic clock, all by name.

    Args:
        at_s: The moment.
        running: Ids of the replicas that work.
        held: Ids of the replicas that hold a place: starting, working or draining.
        wanted: Numbers of replicas that were decided.
        nodes: Numbers of nodes.
    """

    at_s: float
    running: Mapping[str, frozenset[str]]
    held: Mapping[str, frozenset[str]]
    wanted: Mapping[str, int]
    nodes: Mapping[str, int]


class Watch:
    """Looks at the service every ``interval_s`` while the context lasts.

    Args:
        count_nodes: Returns the number of nodes of a pool.
        interval_s: Seconds between two looks.
    """

    def __init__(self, count_nodes: Callable[[str], int], interval_s: float = 0.5) -> None:
        self._count_nodes, self._interval_s = count_nodes, interval_s
        self.sights: list[Sight] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Self:
        self.sights.append(self._look())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def wait_for(self, is_so: Callable[[Sight], bool], within_s: float) -> bool:
        """Wait until what is seen ``is_so``; return whether it was in time."""
        until_s = time.monotonic() + within_s
        while not is_so(self.sights[-1]):
            if time.monotonic() > until_s:
                return False
            time.sleep(self._interval_s)
        return True

    def _look_on(self) -> None:
        while not self._over.wait(self._interval_s):
            self.sights.append(self._look())

    def _look(self) -> Sight:
        details: Any = _get_global_client().get_serve_details()
        deployments = details["applications"][APP_NAME]["deployments"]
        replicas = {name: deployments[name]["replicas"] for name in POOLS}
        return Sight(
            time.monotonic(),
            {
                name: frozenset(r["replica_id"] for r in found if r["state"] == "RUNNING")
                for name, found in replicas.items()
            },
            {name: frozenset(r["replica_id"] for r in found) for name, found in replicas.items()},
            {name: deployments[name]["target_num_replicas"] for name in POOLS},
            {name: self._count_nodes(name) for name in POOLS},
        )


def seen_outcome(
    sights: Sequence[Sight], began_s: float, requests: Sequence[Request], targets: Targets
) -> Outcome:
    """What was seen of a service, and what became of its requests, as a simulation tells it.

    Args:
        sights: What was seen, from the first request on.
        began_s: When the first request was sent, on the same clock.
        requests: The requests, whose moments count from then.
        targets: The targets that they are judged by.
    """
    seconds = {
        name: sum(len(one.held[name]) * (other.at_s - one.at_s) for one, other in pairwise(sights))
        for name in POOLS
    }
    changes = {
        name: [
            Change(other.at_s - began_s, one.wanted[name], other.wanted[name], "")
            for one, other in pairwise(sights)
            if one.wanted[name] != other.wanted[name]
        ]
        for name in POOLS
    }
    span_s = sights[-1].at_s - began_s
    moments = [_moment(one, one.at_s - began_s, requests) for one in sights]
    return Outcome(requests, targets, span_s, seconds, changes, moments)


def _moment(sight: Sight, at_s: float, requests: Sequence[Request]) -> Moment:
    arrived = [one for one in requests if one.arrival.at_s <= at_s]
    first = [one for one in arrived if one.first_s is not None and one.first_s <= at_s]
    ended = sum(one.finished_s is not None and one.finished_s <= at_s for one in first)
    prefill, decode = (len(sight.running[name]) for name in POOLS)
    nodes = [sight.nodes[name] for name in POOLS]
    return Moment(at_s, prefill, decode, len(arrived) - len(first), len(first) - ended, *nodes)


def cold_start_s(sights: Sequence[Sight]) -> float | None:
    """Median seconds from a replica's place to its work, of those seen to start; None of none."""
    placed: dict[str, float] = {}
    started: dict[str, float] = {}
    for one in sights:
        for name in POOLS:
            for replica in one.held[name]:
                placed.setdefault(replica, one.at_s)
            for replica in one.running[name]:
                started.setdefault(replica, one.at_s - placed[replica])
    taken = [seconds for seconds in started.values() if seconds > 0.0]
    return median(taken) if taken else None
