"""The places where pieces are computed: this process, or evaluators of a cluster.

Both keep one contract (``tests/contracts/test_evaluation_pieces.py``); the evaluators' side is
:mod:`rayapp.distributed.measuring_pool`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from rayapp.evaluation.pieces.piece import Done, Piece
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.sides import Sides
from rayapp.models.blocks import decoder_blocks
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.healed import healed_parameters, keep_packed
from rayapp.models.loading import LoadedModel, load_model
from rayapp.models.products.packed import pack_products
from rayapp.plan import STAGES, PruningPlan
from rayapp.settings import DType
from rayapp.vision.llava import image_processor_of

Given = ParamSpec("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Subject:
    """The subject of an evaluation: a model, sizes of batches, and whether there are images.

    ``with_images`` loads the model's image processor, too.
    """

    model: Path
    settings: EvaluationSettings
    with_images: bool = False

    def sides(self, loaded: LoadedModel, plan: PruningPlan) -> Sides:
        """The dense model beside a plan."""
        checkpoint = Checkpoint(self.model)
        processor = (
            image_processor_of(checkpoint.path, checkpoint.config) if self.with_images else None
        )
        return Sides(loaded, plan, self.settings, processor)


class PieceCompute(Protocol):
    """The place where pieces are computed for one plan at a time."""

    def use(self, plan: PruningPlan) -> None:
        """Compare the dense model with this plan from now on."""
        ...

    def run(self, pieces: Sequence[Piece]) -> Iterator[Done]:
        """Compute every piece once; they come in any order, as they finish."""
        ...

    def measure(
        self,
        function: Callable[Concatenate[Sides, Given], Found],
        *args: Given.args,
        **kwargs: Given.kwargs,
    ) -> Found:
        """The result of ``function(sides, ...)`` on any one evaluator.

        The function belongs to a module, so that it can be named to another process.
        """
        ...

    @property
    def num_evaluators(self) -> int:
        """Number of evaluators that compute at the moment."""
        ...


class Place(Protocol):
    """Opens what computes, for as long as the context lives."""

    def open(self, subject: Subject) -> AbstractContextManager[PieceCompute]:
        """Load the subject, and compute its pieces."""
        ...


@dataclass(frozen=True)
class Here:
    """This process, without Ray.

    Attributes:
        dtype: Element type of the engine; ``auto`` is the checkpoint's own.
        device: The device to run on.
    """

    dtype: DType = "auto"
    device: str = "cpu"

    def open(self, subject: Subject) -> AbstractContextManager[PieceCompute]:
        """Load the model into this process."""
        return nullcontext(
            LocalPieces(subject, loaded_packed(subject.model, self.dtype, self.device))
        )


HERE = Here()


def loaded_packed(model: Path, dtype: DType, device: str) -> LoadedModel:
    """A model whose products are packed, as those of a search are and those of the service.

    One model computes both sides, so that no difference of products hides in a ratio of times.
    """
    loaded = load_model(model, dtype=dtype, device=device)
    pack_products(loaded.model, decoder_blocks(loaded.model))
    return loaded


class LocalPieces:
    """Pieces computed in this process, one after the other."""

    num_evaluators = 1

    def __init__(self, subject: Subject, loaded: LoadedModel) -> None:
        self._subject, self._loaded = subject, loaded
        self._sides: Sides | None = None

    def use(self, plan: PruningPlan) -> None:
        """Put this plan beside the dense model; its healed weights are packed, too."""
        for stage in STAGES:
            healed_parameters(self._loaded.model, plan, stage)
            keep_packed(self._loaded.model, plan, stage)
        self._sides = self._subject.sides(self._loaded, plan)

    def run(self, pieces: Sequence[Piece]) -> Iterator[Done]:
        """Compute the pieces in order."""
        for piece in pieces:
            yield compute_piece(self._ready, piece)

    def measure(
        self,
        function: Callable[Concatenate[Sides, Given], Found],
        *args: Given.args,
        **kwargs: Given.kwargs,
    ) -> Found:
        """Measure in this process."""
        return function(self._ready, *args, **kwargs)

    @property
    def _ready(self) -> Sides:
        assert self._sides is not None, "use is called first"
        return self._sides


def compute_piece(sides: Sides, piece: Piece) -> Done:
    """Compute one piece."""
    started = time.perf_counter()
    values = tuple(sides.measured(piece.kind, piece.examples))
    return Done(piece, values, time.perf_counter() - started)
