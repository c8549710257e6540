"""One-shot methods: probe small changes once, then verify the one candidate that they favour.

Probes change one stage only, so they are mostly no candidates of the space; the favourite is. If
evaluations are few, the last one is kept for the favourite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.methods.method import Generation, Setup


class Probing(ABC):
    """Asks for the probes, ascending, then for the favourite."""

    uses_influence = False

    def __init__(self, setup: Setup, phase: str, probes: Sequence[Candidate]) -> None:
        self._phase = phase
        self._generation_size = setup.generation_size
        allowed = len(probes) if setup.evaluations is None else setup.evaluations - 1
        in_space = all(probe in setup.space for probe in probes)
        if in_space and setup.evaluations is not None:
            allowed += 1  # the best probe is the favourite and has its score already
        self._probes = sorted(probes)[:allowed]
        self._told: dict[Candidate, float] = {}
        self._total = len(self._probes) + (not in_space)
        self._asked: tuple[Candidate, ...] = ()

    @abstractmethod
    def favourite(self, scores: Mapping[Candidate, float]) -> Candidate:
        """The candidate of the space that the scores of the probes favour."""

    def ask(self) -> Generation | None:
        """The next probes; after all of them, the favourite."""
        start = len(self._told)
        if start < len(self._probes):
            self._asked = tuple(self._probes[start : start + self._generation_size])
            return Generation(self._asked, self._phase)
        if start == self._total:
            return None
        self._asked = (self.favourite(self._told),)
        return Generation(self._asked, "favourite")

    def tell(self, scores: Sequence[float]) -> None:
        """Remember the probes' scores."""
        self._told.update(zip(self._asked, scores, strict=True))

    @property
    def evaluations_left(self) -> int:
        """Number of probes without a score yet, and the favourite."""
        return self._total - len(self._told)
