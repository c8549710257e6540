"""Scores of plans on lines, and on resamples of the lines within every task.

Shapes: P = plans, L = lines, R = resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayapp.pruning.evaluator.calibration import Calibration


class ResampledScores:
    """Scores (mean over tasks of the mean over tokens) on all lines and on every resample of them.

    All plans meet the same resamples, so that differences between plans are paired by line.

    Args:
        lines: The lines that were scored.
        sums_PL: Sums over the tokens of every line.
        rng: Draws the resamples.
        num_resamples: R.

    Attributes:
        value_P: Scores on the lines themselves.
        resampled_RP: Scores on the resamples.
    """

    def __init__(
        self,
        lines: Calibration,
        sums_PL: NDArray[np.float64],
        rng: np.random.Generator,
        num_resamples: int,
    ) -> None:
        tokens_L = np.array([len(line.continuation) for line in lines.lines], float)
        num_tasks = len(lines.tasks)
        self.value_P = np.zeros(len(sums_PL))
        self.resampled_RP = np.zeros((num_resamples, len(sums_PL)))
        for task in lines.tasks:
            group = np.array([i for i, line in enumerate(lines.lines) if line.task == task])
            even = np.full(len(group), 1 / len(group))
            counts_RL = rng.multinomial(len(group), even, num_resamples)
            tokens_R = counts_RL @ tokens_L[group]
            self.value_P += sums_PL[:, group].sum(axis=1) / tokens_L[group].sum() / num_tasks
            self.resampled_RP += counts_RL @ sums_PL[:, group].T / tokens_R[:, None] / num_tasks
