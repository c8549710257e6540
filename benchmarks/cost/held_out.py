"""The loss of races' plans on lines that no search saw, with a paired bound.

All seeds share one set of fresh lines. A resample draws seeds, and lines within every task, so the
bound holds for other seeds *and* other lines. Shapes: P = plans, S = seeds, R = resamples, L =
lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lines.resampled import ResampledScores
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective

RESAMPLES = 2000
CONFIDENCE = 0.95


def held_out(
    model: PreTrainedModel, lines: Calibration, pairs: Sequence[tuple[Candidate, Candidate]]
) -> dict[str, Any]:
    """Scores of every seed's two plans on fresh lines, and the bound of the races' loss."""
    plans = sorted({plan for pair in pairs for plan in pair})
    evaluator = Evaluator(model, lines, Objective())
    scorer = Scorer(lines, Objective(), LocalCompute(evaluator), weights="benchmark")
    scores = scorer.score_many(plans)
    sums_PL = np.array([score.lines for score in scores])
    indices_S2 = np.array([[plans.index(plan) for plan in pair] for pair in pairs])
    mean, upper = relative_loss(lines, sums_PL, indices_S2)
    return {
        "num_lines": len(lines.lines),
        "plans": [[str(plan) for plan in pair] for pair in pairs],
        "scores": [[scores[index].value for index in row] for row in indices_S2.tolist()],
        "loss": mean,
        "loss_upper_bound": upper,
    }


def relative_loss(
    lines: Calibration, sums_PL: NDArray[np.float64], indices_S2: NDArray[np.int64]
) -> tuple[float, float]:
    """Mean score of the second plans over that of the first, minus one; and its upper bound."""
    rng = np.random.default_rng(0)
    scores = ResampledScores(lines, sums_PL, rng, RESAMPLES)
    seeds_RS = rng.integers(len(indices_S2), size=(RESAMPLES, len(indices_S2)))
    rows = np.arange(RESAMPLES)[:, None]
    whole_R, raced_R = (
        scores.resampled_RP[rows, indices_S2[seeds_RS, k]].sum(axis=1) for k in (0, 1)
    )
    whole, raced = (scores.value_P[indices_S2[:, k]].sum() for k in (0, 1))
    upper = np.quantile(raced_R / whole_R - 1, CONFIDENCE, method="higher")
    return float(raced / whole - 1), float(upper)
