"""One-shot ranking by measured effect (Shortened-LLaMA, arXiv:2402.02834): sums of single units.

From the paper: every unit is removed alone once, and the least harmful ones go together. Project
defaults: a single unit is removed from one stage, the other one dense; the favourite is the
candidate of the space with the least sum, so the coupling rule holds, and its own score is real.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.methods.landscape import Landscape
from rayapp.pruning.methods.method import Setup
from rayapp.pruning.methods.probing import Probing
from rayapp.pruning.methods.quadratic import Quadratic, singles


class OneShot(Probing):
    """Probes the single units of both stages, then verifies the favourite."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "singles", singles(setup.space))
        self._setup = setup

    def favourite(self, scores: Mapping[Candidate, float]) -> Candidate:
        """The candidate with the least sum; an unscored single counts as the worst scored one."""
        landscape = Landscape(self._setup.space)
        effects_M = np.full(landscape.num_variables, max(scores.values(), default=0.0))
        for candidate, score in scores.items():
            effects_M[landscape.features([candidate])[0] > 0] = score
        sums = Quadratic.additive(effects_M)
        return landscape.lowest(sums, 1, rng=lambda index: self._setup.rng(0, index))[0]
