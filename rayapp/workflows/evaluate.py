"""An evaluation, from settings to tables: in this process, or on evaluators of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rayapp.evaluation.pieces.compute import Here, PieceCompute, Place, Subject
from rayapp.evaluation.settings import Spread
from rayapp.settings import ModelSettings


def place_of(model: ModelSettings, spread: Spread) -> Place:
    """Where an evaluation computes: here without ``workers`` and ``address``, else on a cluster."""
    if spread.in_process:
        return Here(model.dtype, model.device)
    return _OnCluster(model, spread)


@dataclass(frozen=True)
class _OnCluster:
    """Evaluators of a cluster, which live as long as the context."""

    model: ModelSettings
    spread: Spread

    def open(self, subject: Subject) -> AbstractContextManager[PieceCompute]:
        """Connect, and start the evaluators.

        Raises:
            ClusterError: The cluster cannot be reached.
        """
        return self._opened(subject)

    @contextmanager
    def _opened(self, subject: Subject) -> Iterator[PieceCompute]:
        # Ray is imported only here: an evaluation in this process runs where Ray is not installed.
        from rayapp.distributed.cluster.connection import connected
        from rayapp.distributed.measuring_pool import MeasuringPool

        told = self.model.model_copy(update={"model": str(subject.model), "revision": None})
        without = "leave out --workers and --address to evaluate in this process"
        with (
            connected(self.spread.address, otherwise=without, log_to_driver=True),
            MeasuringPool(told, subject, workers=self.spread.workers) as pool,
        ):
            yield pool
