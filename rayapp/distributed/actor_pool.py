"""Actors that compute pieces of work: a lost one is replaced, and its work done elsewhere.

What the pieces are, and who gets which, is told by the pools made of it: evaluators of a search
(:mod:`rayapp.distributed.evaluator_pool`) and of an evaluation
(:mod:`rayapp.distributed.measuring_pool`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from rayapp.distributed.cluster.nodes import free_nodes, nodes_on_their_way, spelled
from rayapp.distributed.cluster.patience import HOPELESS_S, Patience
from rayapp.errors import ClusterError, RayappError, SearchError

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Number of evaluators that one piece of work may lose before its pool gives up on it."""

_Measured = TypeVar("_Measured")


@dataclass(eq=False)
class PooledActor:
    """An actor, and the failed starts before it.

    ``chunks`` are those whose states it may still cache, and ``healed`` what was sent to it.
    """

    actor: Any
    failed_starts: int
    chunks: set[int] = field(default_factory=set)
    healed: set[Any] = field(default_factory=set)
    started: bool = False


class ActorPool(ABC):
    """Actors of one class on a running Ray cluster; close it to give them back.

    The class has a method ``start``, which loads what it computes with, and ``alive``, which
    returns at once.

    Args:
        server: The actors' class.
        start: Arguments of its ``start``.
        num_wanted: Number of actors.
        needs: Resources of every actor.
        hopeless_s: How long to wait for a node that can hold an actor, while there is none.
    """

    def __init__(
        self,
        server: type,
        start: Sequence[Any],
        *,
        num_wanted: int,
        needs: dict[str, int],
        hopeless_s: float = HOPELESS_S,
    ) -> None:
        self._server, self._start_with = server, start
        self._num_wanted, self._needs = num_wanted, needs
        self._hopeless_s = hopeless_s
        self._starting: dict[Any, PooledActor] = {}
        self._idle: list[PooledActor] = []
        self._busy: dict[Any, tuple[PooledActor, Any]] = {}
        for _ in range(self._num_wanted):
            self._start_one()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_evaluators(self) -> int:
        """Number of evaluators that are ready or computing, or else the wanted number."""
        return len(self._idle) + len(self._busy) or self._num_wanted

    @abstractmethod
    def _submitted(self, evaluator: PooledActor, piece: Any) -> Any:
        """Submit a piece; return a reference to its result. An actor keeps the order of calls."""

    @abstractmethod
    def _told(self, piece: Any) -> str:
        """What the evaluators died of that lost this piece, and what to do about it."""

    def _chosen(self, _evaluator: PooledActor, waiting: list[Any]) -> Any:
        """Choose the next piece for an evaluator: the first that waits."""
        return waiting[0]

    def _measured(self, reference_of: Any) -> Any:
        """Call an idle evaluator, and another one if that is lost.

        Args:
            reference_of: Function from an evaluator to a reference of the call's result.
        """
        for _ in range(MAX_LOSSES):
            while not self._idle:
                self._wait()
            evaluator = self._idle[0]  # It stays idle if the function fails.
            try:
                return fetched(reference_of(evaluator))
            except RayActorError as error:
                self._idle.remove(evaluator)
                self._lost(evaluator, error)
        raise SearchError(f"{MAX_LOSSES} evaluators died while measuring the model; see their logs")

    def _results(self, waiting: list[Any]) -> Iterator[Any]:
        """Yield the evaluators' results of all pieces as they finish."""
        losses: dict[Any, int] = {}
        while waiting or self._busy:
            self._assign(waiting)
            for reference in self._wait():
                evaluator, piece = self._busy.pop(reference)
                try:
                    done = fetched(reference)
                except RayActorError as error:
                    self._lost(evaluator, error)
                    waiting.insert(0, piece)
                    self._count_loss(losses, piece)
                    continue
                self._idle.append(evaluator)
                yield done

    def close(self) -> None:
        """End all actors."""
        running = [evaluator for evaluator, _ in self._busy.values()]
        for evaluator in [*self._idle, *self._starting.values(), *running]:
            ray.kill(evaluator.actor)
        self._idle, self._starting, self._busy = [], {}, {}

    def _start_one(self, failed_starts: int = 0) -> None:
        actor = ray.remote(self._server).options(**self._needs).remote()
        reference = actor.start.remote(*self._start_with)
        self._starting[reference] = PooledActor(actor, failed_starts)

    def _assign(self, waiting: list[Any]) -> None:
        """Give every idle evaluator a piece."""
        while waiting and self._idle:
            evaluator = self._idle.pop(0)
            piece = self._chosen(evaluator, waiting)
            waiting.remove(piece)
            self._busy[self._submitted(evaluator, piece)] = (evaluator, piece)

    def _wait(self) -> list[Any]:
        """References of work that ended; evaluators that finished starting become idle."""
        if self._busy:
            ready, _ = ray.wait([*self._busy, *self._starting], num_returns=1)
        else:
            ready = self._first_started()
        for reference in [r for r in ready if r in self._starting]:
            evaluator = self._starting.pop(reference)
            try:
                fetched(reference)
                evaluator.started = True
                self._idle.append(evaluator)
            except RayActorError as error:
                self._lost(evaluator, error)
        return [reference for reference in ready if reference in self._busy]

    def _first_started(self) -> list[Any]:
        """References of starts that ended; nothing else runs, so this says what it waits for."""
        patience = Patience(hopeless_s=self._hopeless_s)
        while True:
            ready, _ = ray.wait([*self._starting], num_returns=1, timeout=patience.pause_s)
            if ready:
                return list(ready)
            patience.go_on(self._awaited(), never=self._hopeless())

    def _awaited(self) -> str:
        """How many evaluators load the model, and what the others wait for."""
        known = ray._private.state.actors()
        actors = [evaluator.actor._actor_id.hex() for evaluator in self._starting.values()]
        num_placed = sum(known.get(actor, {}).get("State") == "ALIVE" for actor in actors)
        return (
            f"no evaluator is ready; {num_placed} of {len(actors)} were placed and load the model, "
            f"the others wait for {self._need} ({spelled(free_nodes())})"
        )

    def _hopeless(self) -> str | None:
        """Why no node of the cluster can ever hold an evaluator; None where one can."""
        nodes = [node.idle() for node in free_nodes()]
        room = spelled(nodes)
        if any(node.take(**self._needs) for node in nodes) or nodes_on_their_way():
            return None
        return (
            f"no node of the cluster can hold an evaluator: each needs {self._need}, and even idle "
            f"nodes have no more than this ({room}); add a node that has it, or ask for fewer "
            "--threads or another --device"
        )

    @property
    def _need(self) -> str:
        return "{num_cpus:g} CPU and {num_gpus:g} GPU".format(**self._needs)

    def _lost(self, evaluator: PooledActor, error: RayActorError) -> None:
        """Request a new evaluator, and check whether the idle ones died too, with their node.

        Only evaluators that answer get work again, so a piece counts no loss that is not its own.
        """
        logger.warning("an evaluator was lost, its work is computed again: %s", _first_line(error))
        ray.kill(evaluator.actor)
        failed_starts = 0 if evaluator.started else evaluator.failed_starts + 1
        if failed_starts >= MAX_LOSSES:
            raise ClusterError(
                f"{MAX_LOSSES} evaluators in a row died while loading the model "
                f"({_first_line(error)}); probably memory: give evaluators more"
            )
        self._start_one(failed_starts)
        self._starting |= {idle.actor.alive.remote(): idle for idle in self._idle}
        self._idle = []

    def _count_loss(self, losses: dict[Any, int], piece: Any) -> None:
        losses[piece] = losses.get(piece, 0) + 1
        if losses[piece] >= MAX_LOSSES:
            raise SearchError(f"{MAX_LOSSES} evaluators died {self._told(piece)}")


def fetched(reference: Any) -> Any:
    """Get a result; our own errors are raised unchanged, others as :class:`SearchError`."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RayappError):
            raise error.cause from None
        raise SearchError(f"an evaluator failed: {_first_line(error.cause or error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
