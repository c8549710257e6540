"""One shot: remove the units that change the hidden state least (ShortGPT, arXiv:2403.03853).

Every stage ranks its units by itself. A one-shot ranking collapses on recent models (see the
EvoPress paper's tables, arXiv:2410.14649): the method serves as the baseline, and as the start of
other methods.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayapp.plan import Stage
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.measures.influence import Influence
from rayapp.pruning.methods.method import Generation, Setup


class Similarity:
    """Asks for one candidate: the least influential units of each stage."""

    uses_influence = True

    def __init__(self, setup: Setup) -> None:
        assert setup.influence is not None, "similarity needs the measured influence"
        self._candidate = most_redundant(setup.space, setup.influence)
        self._left = 1

    def ask(self) -> Generation | None:
        """The one candidate, then nothing."""
        return Generation((self._candidate,), "similarity") if self._left else None

    def tell(self, scores: Sequence[float]) -> None:
        """Learn nothing: the choice was made before."""
        self._left -= len(scores)

    @property
    def evaluations_left(self) -> int:
        """One evaluation, until the candidate was scored."""
        return self._left


def most_redundant(
    space: Space, influence: Influence, *, decode: tuple[int, ...] | None = None
) -> Candidate:
    """The units of least influence per stage; decode's own may be given.

    Without kv modes, prefill's units are chosen among those that decode removes; so decode removes
    enough units that prefill may remove, even if that changes the given ones.
    """
    count = space.count("decode")
    wanted = decode or tuple(_least("decode", space, influence, space.pool("decode")))[:count]
    needed = 0 if space.kv_modes else space.count("prefill")
    kept = _least("prefill", space, influence, space.pool("prefill"), wanted)[:needed]
    others = [unit for unit in space.pool("decode") if unit not in kept]
    chosen = (*kept, *_least("decode", space, influence, others, wanted))[:count]
    pool = [unit for unit in space.pool("prefill") if space.kv_modes or unit in chosen]
    prefill = _least("prefill", space, influence, pool)[: space.count("prefill")]
    return space.candidate(tuple(prefill), chosen)


def _least(
    stage: Stage,
    space: Space,
    influence: Influence,
    pool: Sequence[int],
    first: tuple[int, ...] = (),
) -> list[int]:
    """Units of ``pool``: those of ``first`` before the others, then the least influential."""
    values = influence.units(stage, space.num_units)
    return sorted(pool, key=lambda unit: (unit not in first, values[unit], unit))
