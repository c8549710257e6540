"""Evaluators of an evaluation on Ray: pieces whose values equal one process's to the digit.

Every evaluator reads the model from its path by itself, and a plan's healed tensors from the plan's
directory; only pieces, plans and numbers travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate

import ray
import torch

from rayapp.distributed.actor_pool import ActorPool, PooledActor
from rayapp.distributed.cluster.patience import HOPELESS_S
from rayapp.evaluation.pieces.compute import (
    Found,
    Given,
    LocalPieces,
    Subject,
    compute_piece,
    loaded_packed,
)
from rayapp.evaluation.pieces.piece import Done, Piece
from rayapp.evaluation.sides import Sides
from rayapp.models.hub import from_directory, locate
from rayapp.plan import PruningPlan
from rayapp.settings import ModelSettings


class MeasuringServer:
    """The actor's class: both sides of an evaluation, loaded in :meth:`start`."""

    def __init__(self) -> None:
        self._pieces: LocalPieces | None = None
        self._plan = ""

    def start(self, model: ModelSettings, subject: Subject) -> None:
        """Load the model, and return when the evaluator is ready for work."""
        torch.set_num_threads(subject.settings.num_threads)
        directory = locate(model.model, model.revision).directory  # Read or fetched on this node.
        here = Subject(Path(directory), subject.settings, subject.with_images)
        self._pieces = LocalPieces(here, loaded_packed(here.model, model.dtype, model.device))

    def compute(self, plan: PruningPlan, piece: Piece) -> Done:
        """Compute one piece for a plan."""
        return self._beside(plan).measure(compute_piece, piece)

    def measure(
        self, plan: PruningPlan, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Call a function with both sides and return its result."""
        return self._beside(plan).measure(function, *args, **kwargs)

    def alive(self) -> None:
        """Return at once, to show that the actor is alive."""

    def _beside(self, plan: PruningPlan) -> LocalPieces:
        """The pieces of this plan; sides are kept until another plan comes."""
        assert self._pieces is not None, "start is called first"
        if self._plan != plan.fingerprint:
            self._pieces.use(plan)
            self._plan = plan.fingerprint
        return self._pieces


class MeasuringPool(ActorPool):
    """The compute of an evaluation on a running Ray cluster; close it to give the actors back.

    Args:
        model: The model's directory or Hub id as every node can read it, its type and device.
        subject: The sizes of batches, and whether there are images.
        workers: Number of evaluators, each with as many CPUs as it has threads, and one GPU where
            the device is CUDA.
        hopeless_s: How long to wait for a node that can hold an evaluator, while there is none.
    """

    def __init__(
        self,
        model: ModelSettings,
        subject: Subject,
        *,
        workers: int,
        hopeless_s: float = HOPELESS_S,
    ) -> None:
        self._plan: Any = None
        super().__init__(
            MeasuringServer,
            (_readable(model), subject),
            num_wanted=max(1, workers),
            needs={
                "num_cpus": subject.settings.num_threads,
                "num_gpus": int("cuda" in model.device),
            },
            hopeless_s=hopeless_s,
        )

    def use(self, plan: PruningPlan) -> None:
        """Compare the dense model with this plan from now on."""
        self._plan = ray.put(plan)

    def run(self, pieces: Sequence[Piece]) -> Iterator[Done]:
        """Compute every piece once, and yield results as they finish.

        Raises:
            SearchError: A piece lost too many evaluators, or failed in one.
            ClusterError: No node can hold an evaluator.
        """
        yield from self._results(list(pieces))

    def measure(
        self,
        function: Callable[Concatenate[Sides, Given], Found],
        *args: Given.args,
        **kwargs: Given.kwargs,
    ) -> Found:
        """Call a function on one evaluator, and on another one if that is lost.

        Raises:
            SearchError: It lost too many evaluators, or failed in one.
            ClusterError: No node can hold an evaluator.
        """
        found: Found = self._measured(
            lambda evaluator: evaluator.actor.measure.remote(self._plan, function, args, kwargs)
        )
        return found

    def _submitted(self, evaluator: PooledActor, piece: Piece) -> Any:
        return evaluator.actor.compute.remote(self._plan, piece)

    def _told(self, piece: Piece) -> str:
        return (
            f"on {len(piece.examples)} examples ({piece.kind}); probably memory: lower "
            "max_num_seqs, or give evaluators more"
        )


def _readable(model: ModelSettings) -> ModelSettings:
    """The model as another node finds it: a path relative to this process means nothing there."""
    return model.model_copy(update={"model": from_directory(model.model).pinned, "revision": None})
