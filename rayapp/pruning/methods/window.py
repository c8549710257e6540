"""One contiguous window of units per stage (Gromov et al., arXiv:2403.17887).

From the paper: the removed blocks are one run of neighbours. The paper chooses it by the angular
distance between the hidden states before and after the window. Project default: distances over
spans are not measured here; the windows of each stage are **compared by their real scores**, the
other stage dense, at ``n - k + 1`` evaluations. The favourite is the pair of windows with the least
sum of scores (without kv modes, prefill's lies in decode's), and is scored too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from rayapp.errors import InputError
from rayapp.plan import Stage
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space, Units
from rayapp.pruning.methods.method import Setup
from rayapp.pruning.methods.probing import Probing


class Window(Probing):
    """Probes every window of each stage alone, then verifies the best pair.

    Raises:
        InputError: No pair of windows obeys the coupling rule.
    """

    def __init__(self, setup: Setup) -> None:
        self._space = setup.space
        self._pairs = [
            pair
            for pair in itertools.product(
                windows(setup.space, "prefill"), windows(setup.space, "decode")
            )
            if setup.space.candidate(*pair) in setup.space
        ]
        if not self._pairs:
            raise InputError(
                "no contiguous window of prefill lies in one of decode; allow kv modes, change a "
                "size, or choose another method"
            )
        probes = {probe for pair in self._pairs for probe in self._alone(pair)}
        super().__init__(setup, "windows", tuple(probes))

    def favourite(self, scores: Mapping[Candidate, float]) -> Candidate:
        """The pair with the least sum; an unscored window counts as the worst scored one."""
        unknown = max(scores.values(), default=0.0)

        def cost(pair: tuple[Units, Units]) -> tuple[float, Candidate]:
            total = sum(scores.get(probe, unknown) for probe in self._alone(pair))
            return total, self._space.candidate(*pair)

        return min(map(cost, self._pairs))[1]

    def _alone(self, pair: tuple[Units, Units]) -> list[Candidate]:
        """Each stage's window with the other stage dense, for the stages that remove any."""
        prefill, decode = pair
        alone = [self._space.candidate(prefill, ())] if prefill else []
        return alone + ([self._space.candidate((), decode)] if decode else [])


def windows(space: Space, stage: Stage) -> list[Units]:
    """Every run of the stage's size among the units that may go; a size of 0 has the empty run."""
    count, pool = space.count(stage), space.pool(stage)
    starts = range(len(pool) - count + 1) if count else range(1)
    return [pool[start : start + count] for start in starts]
