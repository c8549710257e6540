"""A request router for Serve that honours addresses, and sends work where it is done first.

A booking and the handoff are calls to one decode replica, so the later ones must reach the
replica of the first. Serve has ``choose_replica`` for one call only. A call whose replica has gone
is sent to another one, which refuses it
(:class:`rayapp.distributed.serve.messages.MisdirectedError`): a router that offers nothing would
retry for ever.

Replicas tell their work in seconds every second; the router adds what it has sent since. The choice
itself is :func:`rayapp.scaling.routing.ranked`. Serve pickles this module by value, so nothing else
can read a variable of it (:mod:`rayapp.distributed.serve.known_work`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from rayapp.distributed.serve.known_work import remember
from rayapp.distributed.serve.messages import ANY, Address
from rayapp.engine.request import PromptRequests
from rayapp.scaling.reports import Standing
from rayapp.scaling.routing import Errand, Known, ranked


class AddressedRouter(RequestRouter):
    """Routes to the addressed replica, else to the one that would be done first.

    It is not FIFO, because Serve's FIFO mixin gives a replica chosen for one request to another.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin without knowing anything of any replica; Serve calls this once."""
        del kwargs
        self._known: dict[str, Known] = {}
        self._standings: dict[str, Standing] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates in ranks; Serve takes the shortest queue within a rank."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        address = pending_request.kwargs.get("address", ANY)
        replicas = {r.replica_id.unique_id: r for r in candidate_replicas}
        self._hear(replicas)
        errand = self._errand(address, pending_request.args)
        remember(self._deployment_id.name, self)
        return ranks(address, replicas, self._known, errand, time.time())

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: Any, result: Any
    ) -> None:
        """Remember what was sent to a replica, which its last report does not know."""
        del result
        address = pending_request.kwargs.get("address", ANY)
        if address.replica_id is None and address.preferred is None:
            name = replica_id.unique_id
            work_s = self._work_s(name, pending_request.args)
            self._known[name] = self._known.get(name, Known()).given(time.time(), work_s)

    def _hear(self, replicas: Mapping[str, RunningReplica]) -> None:
        """Take the newest report of every replica, and forget replicas that have gone."""
        self._known = {name: one for name, one in self._known.items() if name in replicas}
        self._standings = {name: one for name, one in self._standings.items() if name in replicas}
        for name, replica in replicas.items():
            standing = Standing.read(replica.routing_stats or {})
            if standing is None or standing == self._standings.get(name):
                continue
            known = self._known.get(name, Known()).reported(
                standing.at_s, standing.work_s, standing.lasts_s
            )
            if not standing.num_failed:
                known = known.succeeded()
            elif standing.num_failed > known.num_failed:
                known = known.failed(time.time())
            self._known[name], self._standings[name] = known, standing

    @property
    def standings(self) -> list[Standing]:
        """The newest reports of the replicas."""
        return list(dict(self._standings).values())

    def wait_s(self, num_tokens: int) -> float:
        """Seconds until the replica that is free first begins a request.

        Args:
            num_tokens: Prompt tokens that will come before, to all replicas alike.
        """
        # Where answers are made side by side, work is no wait; the replica tells how long that is.
        # The router may live in a loop of its own, in another thread than whoever asks.
        standings, known = dict(self._standings), dict(self._known)
        waits = [
            one.wait_s if one.lasts_s else known.get(name, Known()).left_s(time.time())
            for name, one in standings.items()
        ]
        if not waits:
            return 0.0
        token_s = sum(one.token_s for one in standings.values()) / len(waits)
        return min(waits) + num_tokens * token_s / len(waits)

    def _errand(self, address: Address, arguments: list[Any]) -> Errand:
        """The work at hand, as an average replica would do it."""
        works_s = [self._work_s(name, arguments) for name in self._standings]
        work_s = sum(works_s) / len(works_s) if works_s else 0.0
        return Errand(work_s=work_s, avoid=address.avoid)

    def _work_s(self, name: str, arguments: list[Any]) -> float:
        """Seconds of work that a call's arguments mean for a replica."""
        standing = self._standings.get(name)
        if standing is None:
            return 0.0
        prompt = arguments[0] if arguments else None
        num_tokens = prompt.prompt.num_prompt_tokens if isinstance(prompt, PromptRequests) else 0
        return num_tokens * standing.token_s + standing.errand_s


def ranks(
    address: Address,
    replicas: Mapping[str, RunningReplica],
    known: Mapping[str, Known] | None = None,
    errand: Errand | None = None,
    now_s: float = 0.0,
) -> list[list[RunningReplica]]:
    """Sort ``replicas`` (by id) into ranks, in the order in which they are to be tried.

    Serve chooses within a rank by its own count of calls, so replicas whose work differs have ranks
    of their own; those with equal work share one, as do those of which nothing is known.

    Args:
        address: The replica that a call is for or prefers, or those that it is to avoid.
        replicas: The replicas by id.
        known: What is known of them.
        errand: The work of the call.
        now_s: The present Unix time.
    """
    wanted = replicas.get(address.replica_id or "")
    if wanted is not None:
        return [[wanted]]
    booked = replicas.get(address.preferred or "")
    if booked is not None and address.preferred not in address.avoid:
        others = {name: one for name, one in replicas.items() if one is not booked}
        further = replace(address, preferred=None)
        return [[booked], *ranks(further, others, known, errand, now_s)]
    known = known or {}
    errand = errand or Errand(avoid=address.avoid)
    everyone = {name: known.get(name, Known()) for name in replicas}
    result: list[list[RunningReplica]] = []
    for rank in ranked(everyone, errand, now_s):
        for _, alike in groupby(rank, key=lambda name: round(everyone[name].left_s(now_s), 3)):
            result.append([replicas[name] for name in alike])
    return result
