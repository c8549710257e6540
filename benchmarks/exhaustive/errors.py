"""Search errors of all trials, as numbers of a row and cells of a table.

A search error is a method's best score over the trial's optimum, minus one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recorder.table import interval

LIMIT = 0.01
"""Largest search error that counts as the optimum."""
ERROR_COLUMNS = ("within 1 %", "search error, mean (95 %)", "median")


def intervals(means_R: NDArray[np.float64]) -> list[float]:
    """The 95 % interval of resampled means."""
    return [float(value) for value in np.quantile(means_R, [0.025, 0.975])]


def trial_interval(values: Sequence[float], resamples: int) -> list[float]:
    """The 95 % bootstrap interval of a mean over trials."""
    rng = np.random.default_rng(0)
    array = np.array(values)
    return intervals(array[rng.integers(len(array), size=(resamples, len(array)))].mean(axis=1))


def told_errors(errors: Sequence[float], resamples: int) -> dict[str, Any]:
    """A row's numbers about the search errors of all trials."""
    return {
        "within_1_percent": sum(error <= LIMIT for error in errors),
        "trials": len(errors),
        "search_error_mean": statistics.mean(errors),
        "search_error_interval": trial_interval(errors, resamples),
        "search_error_median": statistics.median(errors),
        "search_errors": errors,
    }


def error_cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of such a row under :data:`ERROR_COLUMNS`."""
    return [
        f"{row['within_1_percent']} of {row['trials']}",
        interval(row["search_error_mean"], row["search_error_interval"], ".3g"),
        f"{row['search_error_median']:.3g}",
    ]
