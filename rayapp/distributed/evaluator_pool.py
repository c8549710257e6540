"""Evaluators on Ray: actors with their own models, whose scores equal one process's bit for bit.

Every evaluator reads the model from its path by itself, so no weights travel. Work goes to the
evaluator that computed its chunk before, whose cached states it can use. The work of a lost
evaluator is computed again on another one, and a new evaluator is requested in its place.
Evaluators that a growing cluster places later join in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rayapp.distributed.cluster.nodes import free_nodes, nodes_on_their_way, spelled
from rayapp.distributed.cluster.patience import HOPELESS_S, Patience
from rayapp.errors import ClusterError, RayappError, SearchError
from rayapp.pruning.candidates.healing import HealedUnit, Unit, unit_order
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.healing.training import Healer
from rayapp.pruning.preparation import located, open_evaluator, open_healer
from rayapp.pruning.scorer import Done, Measured, Work, compute_one
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.training import DEFAULT_TRAINING, Training

logger = logging.getLogger(__name__)

Piece = Work | Unit
"""One piece of work for an evaluator: candidates on a chunk, or a unit to train."""

MAX_LOSSES = 3
"""Number of evaluators that one piece of work may lose before the search gives up on it."""


class EvaluatorServer:
    """The actor's class: an evaluator, loaded in :meth:`start` so that errors arrive whole."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | None = None
        self._healer: Healer | None = None

    def start(
        self,
        score: ScoreSettings,
        compute: ComputeSettings,
        training: Training,
        calibration: Calibration,
        heal_data: Calibration | None,
    ) -> None:
        """Load the model, and return when the evaluator is ready for work."""
        score = located(score)  # A model of the Hub is read or fetched on this node.
        self._evaluator = open_evaluator(score, compute, calibration)
        self._healer = open_healer(score, compute, training, self._evaluator, heal_data)

    def compute(self, work: Work) -> Done:
        """Compute one piece of work."""
        return compute_one(self._ready(), work)

    def heal(self, unit: Unit) -> HealedUnit:
        """Train one unit."""
        assert self._healer is not None, "a search that heals brings its data"
        return self._healer.heal(unit)

    def add_healed(self, healed: HealedUnit) -> None:
        """Add a trained unit to the evaluator."""
        self._ready().add_healed(healed)

    def alive(self) -> None:
        """Return at once, to show that the actor is alive."""

    def measure(self, function: Callable[..., Measured], *arguments: object) -> Measured:
        """Call a function with the evaluator and return its result."""
        return function(self._ready(), *arguments)

    def _ready(self) -> Evaluator:
        assert self._evaluator is not None, "start is called first"
        return self._evaluator


@dataclass(eq=False)
class _Evaluator:
    """An actor, the chunks whose states it may still cache, and the failed starts before it.

    ``healed`` are the trained units that were sent to it.
    """

    actor: Any
    failed_starts: int
    chunks: set[int] = field(default_factory=set)
    healed: set[Unit] = field(default_factory=set)
    started: bool = False


class EvaluatorPool:
    """The compute of a search on a running Ray cluster; close it to give the actors back.

    Args:
        score: What is scored; every evaluator reads the model from its path.
        compute: ``workers`` evaluators, each with ``threads`` CPUs, and one GPU where ``device``
            is CUDA.
        calibration: Sent to every evaluator once.
        heal_data: What units are trained on; sent to every evaluator once.
        training: How units are trained.
        hopeless_s: How long to wait for a node that can hold an evaluator, while there is none.
    """

    def __init__(
        self,
        score: ScoreSettings,
        compute: ComputeSettings,
        calibration: Calibration,
        heal_data: Calibration | None = None,
        *,
        training: Training = DEFAULT_TRAINING,
        hopeless_s: float = HOPELESS_S,
    ) -> None:
        self._num_wanted = max(1, compute.workers)
        self._told = (score, compute, training)
        self._calibration, self._heal_data = ray.put(calibration), ray.put(heal_data)
        self._healed: dict[Unit, Any] = {}
        self._hopeless_s = hopeless_s
        self._needs = {"num_cpus": compute.threads, "num_gpus": int("cuda" in compute.device)}
        self._starting: dict[Any, _Evaluator] = {}
        self._idle: list[_Evaluator] = []
        self._busy: dict[Any, tuple[_Evaluator, Piece]] = {}
        for _ in range(self._num_wanted):
            self._start_one()

    def __enter__(self) -> EvaluatorPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_evaluators(self) -> int:
        """Number of evaluators that are ready or computing, or else the wanted number."""
        return len(self._idle) + len(self._busy) or self._num_wanted

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        """Compute every piece of work once, and yield results as they finish.

        Raises:
            SearchError: A piece of work lost too many evaluators, or failed in one.
            ClusterError: No node can hold an evaluator.
        """
        yield from self._results(list(work))

    def heal(self, units: Sequence[Unit]) -> Iterator[HealedUnit]:
        """Train every unit once, and yield units as they finish; raises as :meth:`run` does."""
        yield from self._results(list(units))

    def add_healed(self, healed: HealedUnit) -> None:
        """Keep a trained unit, which is sent to an evaluator before work that needs it."""
        self._healed[healed.unit] = ray.put(healed)

    def _results(self, waiting: list[Any]) -> Iterator[Any]:
        """Yield the evaluators' results of all pieces as they finish."""
        losses: dict[Piece, int] = {}
        while waiting or self._busy:
            self._assign(waiting)
            for reference in self._wait():
                evaluator, piece = self._busy.pop(reference)
                try:
                    done = _fetch(reference)
                except RayActorError as error:
                    self._lost(evaluator, error)
                    waiting.insert(0, piece)
                    _count_loss(losses, piece)
                    continue
                self._idle.append(evaluator)
                yield done

    def measure(
        self, function: Callable[..., Measured], *arguments: object, units: Collection[Unit] = ()
    ) -> Measured:
        """Call a function on one evaluator, and on another one if that is lost.

        Raises:
            SearchError: It lost too many evaluators, or failed in one.
            ClusterError: No node can hold an evaluator.
        """
        for _ in range(MAX_LOSSES):
            while not self._idle:
                self._wait()
            evaluator = self._idle[0]  # It stays idle if the function fails.
            self._send_units(evaluator, frozenset(units))
            try:
                measured: Measured = _fetch(evaluator.actor.measure.remote(function, *arguments))
            except RayActorError as error:
                self._idle.remove(evaluator)
                self._lost(evaluator, error)
                continue
            return measured
        raise SearchError(f"{MAX_LOSSES} evaluators died while measuring the model; see their logs")

    def close(self) -> None:
        """End all actors."""
        running = [evaluator for evaluator, _ in self._busy.values()]
        for evaluator in [*self._idle, *self._starting.values(), *running]:
            ray.kill(evaluator.actor)
        self._idle, self._starting, self._busy = [], {}, {}

    def _start_one(self, failed_starts: int = 0) -> None:
        actor = ray.remote(EvaluatorServer).options(**self._needs).remote()
        reference = actor.start.remote(*self._told, self._calibration, self._heal_data)
        self._starting[reference] = _Evaluator(actor, failed_starts)

    def _assign(self, waiting: list[Any]) -> None:
        """Give every idle evaluator a piece."""
        while waiting and self._idle:
            evaluator = self._idle.pop(0)
            piece = self._chosen(evaluator, waiting)
            waiting.remove(piece)
            self._busy[self._submitted(evaluator, piece)] = (evaluator, piece)

    def _chosen(self, evaluator: _Evaluator, waiting: list[Any]) -> Piece:
        """Choose the next unit, or work on a chunk that the evaluator or nobody has cached."""
        running = [other for other, _ in self._busy.values()]
        taken = {chunk for other in [*self._idle, *running] for chunk in other.chunks}

        def rank(piece: Piece) -> tuple[bool, bool, int]:
            if not isinstance(piece, Work):
                return False, False, 0
            return piece.chunk not in evaluator.chunks, piece.chunk in taken, piece.chunk

        chosen: Piece = min(waiting, key=rank)
        return chosen

    def _submitted(self, evaluator: _Evaluator, piece: Piece) -> Any:
        """Submit a piece; return a reference to its result. An actor keeps the order of calls."""
        if not isinstance(piece, Work):
            return evaluator.actor.heal.remote(piece)
        evaluator.chunks.add(piece.chunk)
        self._send_units(evaluator, piece.units)
        return evaluator.actor.compute.remote(piece)

    def _send_units(self, evaluator: _Evaluator, units: frozenset[Unit]) -> None:
        """Send units to an evaluator before the calls that follow."""
        for unit in sorted(units - evaluator.healed, key=unit_order):
            evaluator.actor.add_healed.remote(self._healed[unit])
            evaluator.healed.add(unit)

    def _wait(self) -> list[Any]:
        """References of work that ended; evaluators that finished starting become idle."""
        if self._busy:
            ready, _ = ray.wait([*self._busy, *self._starting], num_returns=1)
        else:
            ready = self._first_started()
        for reference in [r for r in ready if r in self._starting]:
            evaluator = self._starting.pop(reference)
            try:
                _fetch(reference)
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

    def _lost(self, evaluator: _Evaluator, error: RayActorError) -> None:
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


def _count_loss(losses: dict[Piece, int], piece: Piece) -> None:
    losses[piece] = losses.get(piece, 0) + 1
    if losses[piece] >= MAX_LOSSES:
        what = (
            f"while healing {piece}"
            if not isinstance(piece, Work)
            else f"on chunk {piece.chunk} with {len(piece.candidates)} candidates"
        )
        raise SearchError(
            f"{MAX_LOSSES} evaluators died {what}; probably memory: lower cache_bytes or "
            "chunk_tokens, or give evaluators more"
        )


def _fetch(reference: Any) -> Any:
    """Get a result; our own errors are raised unchanged, others as :class:`SearchError`."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RayappError):
            raise error.cause from None
        raise SearchError(f"an evaluator failed: {_first_line(error.cause or error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
