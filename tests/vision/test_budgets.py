"""Budgets add up, respect limits, and follow what an image holds."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayapp.errors import PlanError
from rayapp.vision.budgets import (
    diversity_weights,
    image_budgets,
    largest_remainder,
    mean_distance,
)
from rayapp.vision.methods.ranking import unit_rows


@given(
    parts=st.lists(
        st.tuples(st.floats(0, 1e6, allow_subnormal=False), st.integers(0, 50)), max_size=8
    ),
    total=st.integers(0, 300),
)
def test_largest_remainder_gives_out_everything_within_the_limits(
    parts: list[tuple[float, int]], total: int
) -> None:
    weights, limits = [w for w, _ in parts], [n for _, n in parts]
    shares = largest_remainder(weights, total, limits)
    assert sum(shares) == min(total, sum(limits))
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))


@given(weights=st.lists(st.integers(1, 100), min_size=1, max_size=8), total=st.integers(0, 500))
def test_no_share_is_a_whole_token_away_from_its_quota(weights: list[int], total: int) -> None:
    shares = largest_remainder(weights, total, [total] * len(weights))
    for share, weight in zip(shares, weights, strict=True):
        assert abs(Fraction(total * weight, sum(weights)) - share) < 1


@pytest.mark.parametrize(
    ("weights", "total", "limits", "expected"),
    [
        ([1, 1, 1], 4, [9, 9, 9], [2, 1, 1]),
        ([3, 1], 2, [9, 9], [2, 0]),
        ([576, 2340], 64, [576, 2340], [13, 51]),
        ([5, 1, 1], 9, [3, 9, 9], [3, 3, 3]),
        ([0, 0], 3, [9, 9], [2, 1]),
        ([0, 1], 5, [9, 2], [3, 2]),
        ([1, 1], 99, [2, 3], [2, 3]),
    ],
)
def test_shares_by_hand(
    weights: list[int], total: int, limits: list[int], expected: list[int]
) -> None:
    assert largest_remainder(weights, total, limits) == expected


def test_equal_budgets_are_each_images_own() -> None:
    assert image_budgets(64, [576, 100, 30]) == [64, 64, 30]
    assert image_budgets(0.1, [576, 100, 30]) == [58, 10, 3]
    with pytest.raises(PlanError, match="num_keep=0"):
        image_budgets(0, [576])


def test_weighted_budgets_keep_the_total_and_no_image_falls_silent() -> None:
    assert image_budgets(10, [576, 576, 576], [3.0, 1.0, 0.0]) == [21, 8, 1]
    assert image_budgets(1, [576, 576], [1.0, 0.0]) == [1, 1]
    assert image_budgets(20, [20, 576], [9.0, 1.0]) == [20, 20]


def test_mean_distance_is_that_of_all_pairs() -> None:
    units = unit_rows(torch.randn(15, 6, generator=torch.Generator().manual_seed(0)))
    pairs = [1 - float(a @ b) for i, a in enumerate(units) for j, b in enumerate(units) if i != j]
    assert mean_distance(units) == pytest.approx(sum(pairs) / len(pairs))
    assert mean_distance(units[:1]) == 0.0


def test_plain_and_repeated_images_weigh_less() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.ones(40, 8) + 0.01 * torch.randn(40, 8, generator=generator)
    varied = torch.randn(40, 8, generator=generator)
    flat, rich = diversity_weights([plain, varied])
    assert rich > 1.5 * flat
    # The same picture twice: equal weights, lower than those of the picture that stands out.
    outlier = -plain
    twice, again, alone = diversity_weights([plain, plain, outlier])
    assert twice == again
    assert alone > twice
    assert diversity_weights([varied]) == [pytest.approx(40 * mean_distance(unit_rows(varied)))]
    assert diversity_weights([varied[:20], varied[:20]])[0] == pytest.approx(
        20 * mean_distance(unit_rows(varied[:20]))
    )
