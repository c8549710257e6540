"""Sums of products give the solution of ``lstsq``, and errors without the tokens at hand."""

from __future__ import annotations

import pytest
import torch

from rayapp.pruning.healing.least_squares import Moments, best_map, products


def drawn(num_tokens, seed, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1e-3, 1.0, 1.0, 10.0, 1e3, 1.0], dtype=torch.float64)
    inputs *= scales
    true = torch.arange(24, dtype=torch.float64).reshape(6, 4) / scales[:, None]
    draw = torch.randn(num_tokens, 4, generator=generator, dtype=torch.float64)
    return inputs, inputs @ true + noise * draw


def moments(inputs, targets):
    squares = targets.square().sum(dim=0)
    return Moments(products(inputs, inputs), products(inputs, targets), squares, len(inputs))


def test_without_a_ridge_it_is_lstsq():
    inputs, targets = drawn(50, 1)
    for prior in (torch.zeros(6, 4).double(), torch.ones(6, 4).double()):
        solved = moments(inputs, targets).solved(prior, 0.0)
        torch.testing.assert_close(solved, torch.linalg.lstsq(inputs, targets).solution)


def test_a_ridge_draws_to_the_prior_whatever_the_inputs_scales():
    inputs, targets = drawn(50, 1)
    prior = torch.ones(6, 4).double()
    far = moments(inputs, targets).solved(prior, 1e12)
    torch.testing.assert_close(far, prior, rtol=1e-4, atol=1e-4)
    scale = torch.tensor([5.0, 1.0, 0.1, 1.0, 1.0, 2.0]).double()
    scaled = moments(inputs * scale, targets).solved(prior / scale[:, None], 0.1)
    torch.testing.assert_close(scaled * scale[:, None], moments(inputs, targets).solved(prior, 0.1))


def test_lacking_rank_is_no_obstacle():
    inputs, targets = drawn(3, 1)
    solved = moments(inputs, targets).solved(torch.zeros(6, 4).double(), 1e-6)
    torch.testing.assert_close(inputs @ solved, targets, rtol=1e-2, atol=1e-2)
    dead = inputs * torch.tensor([1.0, 0, 1, 1, 1, 1])
    assert moments(dead, targets).solved(torch.zeros(6, 4).double(), 1e-6).isfinite().all()


def test_errors_are_those_of_the_tokens():
    inputs, targets = drawn(20, 2)
    guess = torch.full((6, 4), 0.5).double()
    wanted = (inputs @ guess - targets).square().sum(dim=0)
    torch.testing.assert_close(moments(inputs, targets).squared_errors(guess), wanted)


def test_held_back_tokens_choose_the_ridge_and_all_tokens_the_map():
    sides = [moments(*drawn(n, seed)) for n, seed in ((40, 3), (10, 4))]
    solved = best_map(*sides, torch.zeros(6, 4).double(), scale=1.0)
    assert solved.ridge == 1e-6
    assert solved.error_after < solved.error_before
    torch.testing.assert_close(
        solved.map_IO, (sides[0] + sides[1]).solved(torch.zeros(6, 4).double(), 1e-6)
    )


def test_a_prior_that_is_right_stays_as_it_is():
    inputs, _ = drawn(40, 5)
    prior = torch.ones(6, 4).double()
    exact = moments(inputs, inputs @ prior)
    noisy = moments(*drawn(12, 6, noise=1e6))
    solved = best_map(noisy, exact, prior, scale=1.0)
    assert solved.ridge is None
    assert torch.equal(solved.map_IO, prior)
    assert solved.error_after == solved.error_before == pytest.approx(0.0, abs=1e-6)
