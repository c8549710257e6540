"""The paired bootstrap against cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayapp.errors import DataError
from rayapp.evaluation.bootstrap import upper_bound


def test_equal_sides_lose_nothing():
    bound = upper_bound([[0.0] * 50, [0.0] * 7])
    assert (bound.mean, bound.upper, bound.num_examples) == (0.0, 0.0, 57)


def test_a_constant_loss_has_no_spread():
    bound = upper_bound([[2.5] * 40])
    assert bound.mean == bound.upper == 2.5


def test_bound_agrees_with_the_normal_approximation():
    differences = np.random.default_rng(7).normal(1.0, 3.0, size=4_000)
    bound = upper_bound([differences], seed=1)
    expected = differences.mean() + 1.6449 * differences.std() / math.sqrt(len(differences))
    assert bound.upper == pytest.approx(expected, abs=0.01)


def test_bound_of_a_share_agrees_with_the_binomial():
    lost = [100.0] * 80 + [0.0] * 1_920  # 4 points of 2,000 examples
    bound = upper_bound([lost])
    spread = 100 * math.sqrt(0.04 * 0.96 / 2_000)
    assert bound.mean == pytest.approx(4.0)
    assert bound.upper == pytest.approx(4.0 + 1.6449 * spread, abs=0.06)


def test_the_bound_covers_the_truth_in_about_95_of_100_samples():
    rng = np.random.default_rng(3)
    bounds = [
        upper_bound([rng.normal(0.0, 1.0, size=60)], seed=i, num_resamples=400).upper
        for i in range(300)
    ]
    assert 0.91 <= np.mean(np.array(bounds) >= 0.0) <= 0.985


def test_tasks_weigh_alike_whatever_their_size():
    bound = upper_bound([[10.0] * 5, [0.0] * 500])
    assert bound.mean == pytest.approx(5.0)


def test_weights_pool_tokens_within_a_task():
    bound = upper_bound([[1.0, 4.0]], weights=[[3.0, 1.0]])
    assert bound.mean == pytest.approx((3 * 1 + 1 * 4) / 4)
    assert bound.upper == 4.0  # both draws may be the worse example


def test_gains_and_losses_cancel_but_widen_the_bound():
    mixed = upper_bound([[100.0, -100.0] * 50])
    assert mixed.mean == 0.0
    assert 10.0 < mixed.upper < 25.0  # 1.645 x 100 / sqrt(100) = 16.4


def test_seeded():
    values = list(np.random.default_rng(0).normal(size=30))
    assert upper_bound([values], seed=5) == upper_bound([values], seed=5)
    assert upper_bound([values], seed=5).upper != upper_bound([values], seed=6).upper


@pytest.mark.parametrize("groups", [[], [[1.0], []]])
def test_a_task_without_examples_is_refused(groups):
    with pytest.raises(DataError, match="at least one example"):
        upper_bound(groups)
