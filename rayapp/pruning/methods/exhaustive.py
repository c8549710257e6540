"""Every candidate of the space: the truth that other methods are measured against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rayapp.errors import InputError
from rayapp.pruning.methods.method import Generation, Setup

MAX_SIZE = 100_000


class Exhaustive:
    """Asks for all candidates in ascending order.

    Raises:
        InputError: The space is larger than the evaluations allowed, or than ``MAX_SIZE``.
    """

    uses_influence = False

    def __init__(self, setup: Setup) -> None:
        size = setup.space.size
        limit = MAX_SIZE if setup.evaluations is None else setup.evaluations
        if size > limit:
            raise InputError(
                f"exhaustive search scores all {size} candidates, but at most {limit} evaluations "
                "are allowed; raise --evaluations, remove fewer blocks, or choose another method"
            )
        self._left = size
        self._candidates = iter(setup.space)
        self._generation_size = setup.generation_size

    def ask(self) -> Generation | None:
        """The next candidates, ascending."""
        candidates = tuple(itertools.islice(self._candidates, self._generation_size))
        return Generation(candidates, "exhaustive") if candidates else None

    def tell(self, scores: Sequence[float]) -> None:
        """Learn nothing: the order is fixed."""
        self._left -= len(scores)

    @property
    def evaluations_left(self) -> int:
        """Candidates not yet scored."""
        return self._left
