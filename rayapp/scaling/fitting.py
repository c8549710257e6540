"""Costs are fitted while a replica serves: least squares over the steps that it has timed.

Older steps count less, so a cost follows the machine; the first steps of a replica are forgotten,
because a cold start says little about the rate at which it will work. Coefficients are never
negative: a feature whose coefficient would be is left out, and the rest is fitted again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_COLD = 3
"""Steps after a start that are forgotten as soon as there is a later one (project default)."""
MEMORY_STEPS = 500.0
"""Steps after which a measurement counts 1/e of a new one (project default)."""


class LinearFit:
    """A linear cost over a few features, such as tokens and pairs, that keeps learning.

    Args:
        scales: The usual size of every feature, so that none outweighs another.
    """

    def __init__(self, scales: Sequence[float]) -> None:
        self._scales = np.asarray(scales, dtype=float)
        self._products = np.zeros((len(scales), len(scales)))
        self._answers = np.zeros(len(scales))
        self._num_seen = 0
        self._solved: tuple[float, ...] | None = None

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Count a step that had these features and took ``seconds``."""
        if not np.isfinite(seconds) or seconds < 0.0:
            return
        self._num_seen += 1
        if self._num_seen == NUM_COLD + 1:
            # Until now the cold steps were better than nothing.
            self._products[:], self._answers[:] = 0.0, 0.0
        scaled = np.asarray(features, dtype=float) / self._scales
        fade = 1.0 - 1.0 / MEMORY_STEPS
        self._products = fade * self._products + np.outer(scaled, scaled)
        self._answers = fade * self._answers + scaled * seconds
        self._solved = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of every feature, none below 0; zeros before anything is known."""
        if self._solved is None:
            self._solved = tuple(self._solve() / self._scales)
        return self._solved

    def _solve(self) -> np.ndarray:
        used = list(range(len(self._scales)))
        found = np.zeros(len(self._scales))
        while used and self._num_seen:
            # A little ridge decides between features that always came together.
            ridge = 1e-6 * max(1e-12, float(np.trace(self._products))) * np.eye(len(used))
            part = np.linalg.solve(self._products[np.ix_(used, used)] + ridge, self._answers[used])
            if (part >= 0.0).all():
                found[used] = part
                break
            used.remove(used[int(np.argmin(part))])
        return found
