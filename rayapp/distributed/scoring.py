"""``score_many`` on Ray: evaluator actors, each with its own model, bit-equal to one process.

Each evaluator reads the model from its path by itself, so no weights travel. Work goes where its
chunk was computed before, to find cached states there. A lost evaluator's work is computed again on
another, and a new evaluator is asked for in its place; evaluators that a growing cluster places
later join in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rayapp.errors import ClusterError, RayappError, SearchError
from rayapp.pruning.calibration import Calibration
from rayapp.pruning.costs import Costs, measure_costs
from rayapp.pruning.evaluator import Evaluator
from rayapp.pruning.preparation import open_evaluator
from rayapp.pruning.scoring import Done, Work, compute_one
from rayapp.pruning.settings import PruneSettings
from rayapp.pruning.similarity import Influence, measure_influence

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
MAX_LOSSES = 3
"""Evaluators that one piece of work may lose before the search gives up on it."""


class EvaluatorServer:
    """What runs in an actor: an evaluator, loaded in :meth:`start` so that errors arrive whole."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | None = None

    def start(self, settings: PruneSettings, calibration: Calibration) -> None:
        """Load the model; returns when work can be done."""
        self._evaluator = open_evaluator(settings, calibration)

    def compute(self, work: Work) -> Done:
        """One piece of work."""
        return compute_one(self._ready(), work)

    def alive(self) -> None:
        """Return: who answers is there."""

    def influence(self) -> Influence:
        """Block and part influence of the dense model."""
        return measure_influence(self._ready())

    def costs(self) -> Costs:
        """Seconds and bytes of every part."""
        return measure_costs(self._ready())

    def _ready(self) -> Evaluator:
        assert self._evaluator is not None, "start is called first"
        return self._evaluator


@dataclass(eq=False)
class _Evaluator:
    """An actor, the chunks whose states it may still hold, and starts that failed before it."""

    actor: Any
    failed_starts: int
    chunks: set[int] = field(default_factory=set)
    started: bool = False


class EvaluatorPool:
    """The compute of a search on a running Ray cluster; close it to give the actors back.

    Args:
        settings: ``workers`` evaluators, each with ``threads`` CPUs, and one GPU where ``device``
            is CUDA.
        calibration: Sent to every evaluator once.
        start_timeout_s: How long to wait while no evaluator at all is running.
    """

    def __init__(
        self,
        settings: PruneSettings,
        calibration: Calibration,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._settings = settings
        self._calibration = ray.put(calibration)
        self._start_timeout_s = start_timeout_s
        self._needs = {"num_cpus": settings.threads, "num_gpus": int("cuda" in settings.device)}
        self._starting: dict[Any, _Evaluator] = {}
        self._idle: list[_Evaluator] = []
        self._busy: dict[Any, tuple[_Evaluator, Work]] = {}
        for _ in range(max(1, settings.workers)):
            self._start_one()

    def __enter__(self) -> EvaluatorPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_evaluators(self) -> int:
        """Evaluators that are ready or computing; while none is, the number asked for."""
        return len(self._idle) + len(self._busy) or max(1, self._settings.workers)

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        """Every piece of work once, as it finishes.

        Raises:
            SearchError: A piece of work lost too many evaluators, or failed in one.
            ClusterError: No evaluator could be placed in time.
        """
        waiting = list(work)
        losses: dict[Work, int] = {}
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

    def influence(self) -> Influence:
        """Measured on one evaluator, on another one if it is lost."""
        found: Influence = self._measured("influence")
        return found

    def costs(self) -> Costs:
        """Measured on one evaluator, on another one if it is lost."""
        found: Costs = self._measured("costs")
        return found

    def _measured(self, what: str) -> Any:
        for _ in range(MAX_LOSSES):
            while not self._idle:
                self._wait()
            evaluator = self._idle.pop(0)
            try:
                found = _fetch(getattr(evaluator.actor, what).remote())
            except RayActorError as error:
                self._lost(evaluator, error)
                continue
            self._idle.append(evaluator)
            return found
        raise SearchError(f"{MAX_LOSSES} evaluators died while measuring the model; see their logs")

    def close(self) -> None:
        """End all actors."""
        running = [evaluator for evaluator, _ in self._busy.values()]
        for evaluator in [*self._idle, *self._starting.values(), *running]:
            ray.kill(evaluator.actor)
        self._idle, self._starting, self._busy = [], {}, {}

    def _start_one(self, failed_starts: int = 0) -> None:
        actor = ray.remote(EvaluatorServer).options(**self._needs).remote()
        reference = actor.start.remote(self._settings, self._calibration)
        self._starting[reference] = _Evaluator(actor, failed_starts)

    def _assign(self, waiting: list[Work]) -> None:
        """Give every idle evaluator a piece: of a chunk that it knows, or that nobody does."""
        while waiting and self._idle:
            evaluator = self._idle.pop(0)
            running = [other for other, _ in self._busy.values()]
            taken = {chunk for other in [*self._idle, *running] for chunk in other.chunks}
            piece = min(
                waiting, key=lambda w: (w.chunk not in evaluator.chunks, w.chunk in taken, w.chunk)
            )
            waiting.remove(piece)
            evaluator.chunks.add(piece.chunk)
            self._busy[evaluator.actor.compute.remote(piece)] = (evaluator, piece)

    def _wait(self) -> list[Any]:
        """References of work that ended; evaluators that finished starting become idle."""
        pending = [*self._busy, *self._starting]
        timeout = None if self._busy else self._start_timeout_s
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout)
        if not ready:
            raise ClusterError(
                f"no evaluator was placed within {self._start_timeout_s:.0f} s: each needs "
                f"{self._needs}, the cluster has {ray.available_resources()} free; free some, or "
                "ask for fewer --workers"
            )
        for reference in [r for r in ready if r in self._starting]:
            evaluator = self._starting.pop(reference)
            try:
                _fetch(reference)
                evaluator.started = True
                self._idle.append(evaluator)
            except RayActorError as error:
                self._lost(evaluator, error)
        return [reference for reference in ready if reference in self._busy]

    def _lost(self, evaluator: _Evaluator, error: RayActorError) -> None:
        """Ask for another in its place, and whether the idle ones died too, as with their node.

        Only who answers gets work again, so a piece of work counts no loss that is not its own.
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


def _count_loss(losses: dict[Work, int], piece: Work) -> None:
    losses[piece] = losses.get(piece, 0) + 1
    if losses[piece] >= MAX_LOSSES:
        raise SearchError(
            f"{MAX_LOSSES} evaluators died on chunk {piece.chunk} with {len(piece.candidates)} "
            "candidates; probably memory: lower cache_bytes or chunk_tokens, or give evaluators "
            "more"
        )


def _fetch(reference: Any) -> Any:
    """A result; errors of ours are raised as they are, others as :class:`SearchError`."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RayappError):
            raise error.cause from None
        raise SearchError(f"an evaluator failed: {_first_line(error.cause or error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
