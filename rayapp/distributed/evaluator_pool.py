"""Evaluators on Ray: actors with their own models, whose scores equal one process's bit for bit.

Every evaluator reads the model from its path by itself, so no weights travel. Work goes to the
evaluator that computed its chunk before, whose cached states it can use. The work of a lost
evaluator is computed again on another one, and a new evaluator is requested in its place.
Evaluators that a growing cluster places later join in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import ray

from rayapp.distributed.actor_pool import ActorPool, PooledActor
from rayapp.distributed.cluster.patience import HOPELESS_S
from rayapp.pruning.candidates.healing import HealedUnit, Unit, unit_order
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.healing.training import Healer
from rayapp.pruning.preparation import located, open_evaluator, open_healer
from rayapp.pruning.scorer import Done, Measured, Work, compute_one
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.training import DEFAULT_TRAINING, Training

Piece = Work | Unit
"""One piece of work for an evaluator: candidates on a chunk, or a unit to train."""


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


class EvaluatorPool(ActorPool):
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
        told = (score, compute, training)
        self._healed: dict[Unit, Any] = {}
        super().__init__(
            EvaluatorServer,
            (*told, ray.put(calibration), ray.put(heal_data)),
            num_wanted=max(1, compute.workers),
            needs={"num_cpus": compute.threads, "num_gpus": int("cuda" in compute.device)},
            hopeless_s=hopeless_s,
        )

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

    def measure(
        self, function: Callable[..., Measured], *arguments: object, units: Collection[Unit] = ()
    ) -> Measured:
        """Call a function on one evaluator, and on another one if that is lost.

        Raises:
            SearchError: It lost too many evaluators, or failed in one.
            ClusterError: No node can hold an evaluator.
        """

        def called(evaluator: PooledActor) -> Any:
            self._send_units(evaluator, frozenset(units))
            return evaluator.actor.measure.remote(function, *arguments)

        measured: Measured = self._measured(called)
        return measured

    def _chosen(self, evaluator: PooledActor, waiting: list[Any]) -> Piece:
        """Choose the next unit, or work on a chunk that the evaluator or nobody has cached."""
        running = [other for other, _ in self._busy.values()]
        taken = {chunk for other in [*self._idle, *running] for chunk in other.chunks}

        def rank(piece: Piece) -> tuple[bool, bool, int]:
            if not isinstance(piece, Work):
                return False, False, 0
            return piece.chunk not in evaluator.chunks, piece.chunk in taken, piece.chunk

        chosen: Piece = min(waiting, key=rank)
        return chosen

    def _submitted(self, evaluator: PooledActor, piece: Piece) -> Any:
        """Submit a piece; return a reference to its result. An actor keeps the order of calls."""
        if not isinstance(piece, Work):
            return evaluator.actor.heal.remote(piece)
        evaluator.chunks.add(piece.chunk)
        self._send_units(evaluator, piece.units)
        return evaluator.actor.compute.remote(piece)

    def _send_units(self, evaluator: PooledActor, units: frozenset[Unit]) -> None:
        """Send units to an evaluator before the calls that follow."""
        for unit in sorted(units - evaluator.healed, key=unit_order):
            evaluator.actor.add_healed.remote(self._healed[unit])
            evaluator.healed.add(unit)

    def _told(self, piece: Piece) -> str:
        what = (
            f"while healing {piece}"
            if not isinstance(piece, Work)
            else f"on chunk {piece.chunk} with {len(piece.candidates)} candidates"
        )
        return (
            f"{what}; probably memory: lower cache_bytes or chunk_tokens, or give evaluators more"
        )
