"""Room for KV on a node that prefills: one account, which all prefill replicas of the node share.

KV of a prompt is in the memory of its node from its first step until decode has copied it, whoever
wants it. The replica takes room before that step, and the ingress gives it back. The account is
an actor on the node: it belongs to no replica, so that it outlives the one that started it, and it
ends by itself when none is left. It knows nothing of models, so it starts without their machinery.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayapp.distributed.serve.callers import Callers
from rayapp.engine.budget import ByteBudget
from rayapp.errors import UnavailableError

logger = logging.getLogger(__name__)

_NAMESPACE = "rayapp"
_MANY = 100_000
"""More calls than can wait for room at once, beside those that give it back."""
_TRIES = 2
_MAX_OVER = 4096
"""Attempts that are remembered as over, the latest ones: far more than can be on their way."""

Key = tuple[str, int]
"""The name of a prompt's requests, and their attempt."""


@dataclass(eq=False)
class _Claim:
    """Bytes of one attempt, which has room for them once ``taking`` is done."""

    num_bytes: int
    taking: asyncio.Future[None]
    releases: list[Callable[[], None]] = field(default_factory=list)


class RoomKeeper:
    """The account of one node, as an actor.

    What an attempt holds is given back by whoever knows that it is over, or once its owner has
    died: the replica that computes it, or the ingress that waits for it.

    Args:
        callers: What watches owners and replicas.
    """

    def __init__(self, callers: Callers | None = None) -> None:
        self._budget = ByteBudget()
        self._claims: dict[Key, _Claim] = {}
        self._over: dict[Key, None] = {}
        self._replicas: set[str] = set()
        self._callers = callers or Callers()

    async def join(self, replica: str, max_bytes: int) -> None:
        """Serve a replica, under the limit that it knows, until it has died.

        Args:
            replica: Name of its actor; a replica without a name is not waited for.
            max_bytes: Most bytes that all replicas of the node may have under way.
        """
        self._budget.max_bytes = max_bytes
        self._budget.give(0)  # Whoever waits looks at the new limit.
        if replica and replica not in self._replicas:
            self._replicas.add(replica)
            self._callers.hold(replica, partial(self._leave, replica))

    async def take(self, key: Key, num_bytes: int, owners: tuple[str, ...]) -> bool:
        """Count an attempt's bytes once they fit; return whether it is wanted still.

        Args:
            key: The attempt, which has not taken room before.
            num_bytes: Bytes of its KV, as the plan forecasts them.
            owners: Names of the actors whose death gives the bytes back.
        """
        if self._over.pop(key, self) is None:
            return False
        taking = asyncio.ensure_future(self._budget.take(num_bytes))
        claim = _Claim(num_bytes, taking)
        self._claims[key] = claim
        claim.releases = [self._callers.hold(o, partial(self._give, key)) for o in owners]
        await asyncio.wait([taking])
        return self._claims.get(key) is claim

    async def give(self, key: Key) -> None:
        """Count an attempt's bytes no more, or have it wait no more; a second call is harmless.

        Nothing orders calls on their way here: an attempt that is over before it wants room
        gets none.
        """
        if key not in self._claims:
            self._over[key] = None
            if len(self._over) > _MAX_OVER:
                del self._over[next(iter(self._over))]
        self._give(key)

    async def counts(self) -> dict[str, int]:
        """Numbers of bytes and attempts that have room or wait for it: zero when idle."""
        return {"bytes": self._budget.pinned_bytes, "attempts": len(self._claims)}

    def _give(self, key: Key) -> None:
        claim = self._claims.pop(key, None)
        if claim is None:
            return
        for release in claim.releases:
            release()
        if not claim.taking.cancel():
            self._budget.give(claim.num_bytes)

    def _leave(self, replica: str) -> None:
        self._replicas.discard(replica)
        if not self._replicas:
            logger.info("no prefill replica is left on this node")
            ray.kill(ray.get_runtime_context().current_actor)


class NodeRoom:
    """A replica's way to the account of its node.

    Args:
        node: The node's id.
        max_bytes: Most bytes of KV that the node's replicas may have under way.
        replica: Name of this replica's actor.
    """

    def __init__(self, node: str, max_bytes: int, replica: str) -> None:
        self._node = node
        self._max_bytes = max_bytes
        self._replica = replica
        self._keeper = self._opened()

    def _opened(self) -> Any:
        here = NodeAffinitySchedulingStrategy(self._node, soft=False)
        keeper = (
            ray.remote(RoomKeeper)
            .options(
                name=_name(self._node),
                namespace=_NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                max_concurrency=_MANY,
                scheduling_strategy=here,
            )
            .remote()
        )
        keeper.join.remote(self._replica, self._max_bytes)
        return keeper

    async def take(self, key: Key, num_bytes: int, caller: str) -> None:
        """Return once the node has room for an attempt's KV; the ingress gives it back.

        Args:
            key: The attempt.
            num_bytes: Bytes of its KV, as the plan forecasts them.
            caller: Name of the ingress's actor, which owns the KV.

        Raises:
            UnavailableError: The attempt was given up while it waited.
        """
        owners = (self._replica, caller)
        for _ in range(_TRIES):
            try:
                if await self._keeper.take.remote(key, num_bytes, owners):
                    return
            except asyncio.CancelledError:
                self.give(key)
                raise
            except RayActorError as error:
                logger.warning("the account of this node is opened anew: %s", error)
                self._keeper = self._opened()
                continue
            raise UnavailableError(f"request {key[0]} was given up before its node had room")
        # An account that cannot be kept must not keep anybody from being served.
        logger.error("this node has no account of its KV; going on without")

    def give(self, key: Key) -> None:
        """Give an attempt's room back, or wait for it no more; nobody needs to wait for this.

        An empty context makes the call belong to no request, whose cancellation would end it.
        """
        Context().run(self._keeper.give.remote, key)

    async def counts(self) -> dict[str, int]:
        """What all attempts of this node hold: zero when idle."""
        return dict(await self._keeper.counts.remote())


class NodeRooms:
    """An ingress's way to the accounts of all nodes."""

    def __init__(self) -> None:
        self._keepers: dict[str, Any] = {}
        self._giving: set[asyncio.Task[None]] = set()

    def give(self, node: str, key: Key) -> None:
        """Give an attempt's room back; nobody needs to wait for this.

        It is done outside the request, whose end would cancel it.
        """
        giving = asyncio.get_running_loop().create_task(self._give(node, key), context=Context())
        self._giving.add(giving)
        giving.add_done_callback(self._giving.discard)

    async def _give(self, node: str, key: Key) -> None:
        for _ in range(_TRIES):
            try:
                if node not in self._keepers:
                    found = await asyncio.to_thread(ray.get_actor, _name(node), _NAMESPACE)
                    self._keepers[node] = found
                await self._keepers[node].give.remote(key)
            except (RayError, ValueError) as error:
                logger.debug("the account of node %s: %r", node, error)
                self._keepers.pop(node, None)
                continue
            return


def _name(node: str) -> str:
    return f"kv-room-{node}"
