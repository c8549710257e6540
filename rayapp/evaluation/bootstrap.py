"""Paired bootstrap: how much worse than the dense model a plan may be, given these examples.

Shapes: K = values of an example, N = examples, R = resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rayapp.errors import DataError

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
_ROWS_AT_ONCE = 250

Samples = Sequence[float] | NDArray[np.floating]


class Bound(BaseModel):
    """A mean difference, dense to plan, and its one-sided upper bound (higher = worse plan).

    ``num_examples`` is the number of pairs that it rests on; ``upper`` is the bound at
    :data:`CONFIDENCE`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    upper: float
    num_examples: int = Field(ge=1)


class Interval(BaseModel):
    """A paired estimate with its 95 % intervals, over resampled examples.

    ``lower`` and ``upper`` are the ends of the two-sided interval, and ``at_least`` is the
    one-sided lower bound, which a claim of the form "keeps at least" is judged by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    lower: float
    upper: float
    at_least: float
    num_examples: int = Field(ge=1)


@dataclass(frozen=True)
class Resampled:
    """An estimate on the sample itself, and on every resample ``drawn_R`` of it."""

    mean: float
    drawn_R: NDArray[np.floating]
    num_examples: int

    def interval(self, num_compared: int = 1) -> Interval:
        """Its intervals, widened as if ``num_compared`` of them must all hold (Bonferroni)."""
        miss = (1 - CONFIDENCE) / num_compared
        lower = np.quantile(self.drawn_R, miss / 2, method="lower")
        upper = np.quantile(self.drawn_R, 1 - miss / 2, method="higher")
        at_least = np.quantile(self.drawn_R, miss, method="lower")
        return Interval(
            mean=self.mean,
            lower=float(lower),
            upper=float(upper),
            at_least=float(at_least),
            num_examples=self.num_examples,
        )

    @classmethod
    def mean_of(cls, parts: Sequence[Resampled]) -> Resampled:
        """The mean of several estimates whose examples are drawn independently."""
        return cls(
            float(np.mean([part.mean for part in parts])),
            np.mean([part.drawn_R for part in parts], axis=0),
            sum(part.num_examples for part in parts),
        )


def resampled_means(
    values_KN: Sequence[Samples],
    *,
    weights: Samples | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Weighted means of several values per example, and their means in every paired resample.

    An example that is drawn brings all its values, so ratios and differences of the means are
    paired.

    Args:
        values_KN: K values of all N examples.
        weights: Weight of every example; None weighs them alike.
        seed: Seed of the resampling.
        num_resamples: Number of resamples, R.

    Returns:
        Means ``(K,)`` and resampled means ``(K, R)``.

    Raises:
        DataError: There is no example.
    """
    matrix_KN = np.asarray(values_KN, float)
    count = matrix_KN.shape[1]
    if count == 0:
        raise DataError("an interval needs at least one example; drop tasks without any")
    weights_N = np.ones(count) if weights is None else np.asarray(weights, float)
    weighted_NK = np.column_stack([matrix_KN.T * weights_N[:, None], weights_N])
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, num_resamples, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, num_resamples - start)
        index_RN = rng.integers(count, size=(rows, count))
        sums_RK = np.stack([column[index_RN].sum(axis=1) for column in weighted_NK.T], axis=1)
        parts.append(sums_RK[:, :-1] / sums_RK[:, -1:])
    means_K = weighted_NK[:, :-1].sum(axis=0) / weights_N.sum()
    return means_K, np.concatenate(parts).T


def upper_bound(
    groups: Sequence[Samples],
    *,
    weights: Sequence[Samples] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Bound:
    """The mean over groups of each group's mean paired difference, and its 95 % upper bound.

    Pairs are drawn with replacement within their own group (stratified), all groups anew in every
    resample; the bound is the 95th percentile of the resampled means (the next higher one, never an
    interpolation below it). If no pair differs the bound is 0: no resample can show a loss that the
    sample does not have, so judge such a bound by its sample size.

    Args:
        groups: How much worse the plan is, one value per pair, for every group (task).
        weights: Weight of every example within its group, for example its number of tokens; None
            weighs examples alike. A group's mean is ``sum(w x d) / sum(w)``.
        seed: Seed of the resampling.
        num_resamples: Number of resamples.

    Returns:
        Mean and bound in the unit of ``groups``.

    Raises:
        DataError: If there is no group, or a group has no example.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise DataError("a bound needs at least one example in every task; drop tasks without any")
    rng = np.random.default_rng(seed)
    means, drawn = [], np.zeros(num_resamples)
    for index, group in enumerate(groups):
        weight = np.ones(len(group)) if weights is None else np.asarray(weights[index], float)
        values = np.asarray(group, float) * weight
        means.append(values.sum() / weight.sum())
        drawn += _resampled_means(values, weight, num_resamples, rng)
    upper = np.quantile(drawn / len(groups), CONFIDENCE, method="higher")
    count = sum(len(group) for group in groups)
    return Bound(mean=float(np.mean(means)), upper=float(upper), num_examples=count)


def _resampled_means(
    values_N: NDArray[np.floating],
    weights_N: NDArray[np.floating],
    num_resamples: int,
    rng: np.random.Generator,
) -> NDArray[np.floating]:
    """Weighted means of draws with replacement, a bounded number of rows at once."""
    count = len(values_N)
    parts = []
    for start in range(0, num_resamples, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, num_resamples - start)
        index_RN = rng.integers(count, size=(rows, count))
        parts.append(values_N[index_RN].sum(axis=1) / weights_N[index_RN].sum(axis=1))
    return np.concatenate(parts)
