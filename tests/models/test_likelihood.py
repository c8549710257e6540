from __future__ import annotations

import math

import pytest
import torch

from rayapp.models.likelihood import kl, log_softmax64, nll


def test_nll_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    got = nll(logits, torch.tensor([1, 0]))
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, torch.tensor([-math.log(0.75), math.log(2.0)]).double(), atol=1e-7, rtol=0
    )


def test_kl_by_hand_and_zero():
    p = torch.tensor([[0.2, 0.8]]).double()
    q = torch.tensor([[0.5, 0.5]]).double()
    want = 0.2 * math.log(0.4) + 0.8 * math.log(1.6)
    torch.testing.assert_close(kl(p.log(), q.log() + 3.0), torch.tensor([want]).double())
    assert kl(p.log(), p.log()).item() == 0.0


def exact_kl(dense, plan):
    p, q = log_softmax64(dense), log_softmax64(plan)
    return (p.exp() * (p - q)).sum(-1)


def within_the_determinism_bound(found, wanted):
    """EVALUATION: ``|difference| <= 1e-5 x score + 1e-7``; a tenth of it is left to the model."""
    return ((found - wanted).abs() <= 0.5 * (1e-5 * wanted + 1e-7)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, -100.0])
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.1, 1.0, 8.0, 40.0])
def test_kl_and_nll_over_a_large_vocabulary_err_less_than_scores_may(spread, shift, dtype):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 49_152, generator=generator) * 3
    dense[3:] *= 4  # peaked distributions
    dense = dense.to(dtype)
    noise = spread * torch.randn(6, 49_152, generator=generator)
    plan = (dense.float() + noise + shift).to(dtype)
    found = kl(dense, plan)
    assert found.dtype == torch.float64
    assert within_the_determinism_bound(found, exact_kl(dense, plan))
    ids = torch.cat([dense.argmax(-1)[:3], torch.tensor([0, 1, 2])])
    wanted = -log_softmax64(plan).gather(-1, ids[:, None])[:, 0]
    assert within_the_determinism_bound(nll(plan, ids), wanted)


def test_small_divergences_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=generator)
    other = logits + 1e-3 * torch.randn(64, 5000, generator=generator)
    torch.testing.assert_close(kl(logits, other), exact_kl(logits, other), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        kl(logits.double(), other.double()), exact_kl(logits, other), rtol=1e-8, atol=1e-14
    )
    assert (kl(logits, logits) == 0).all()
    torch.testing.assert_close(log_softmax64(logits).exp().sum(-1), torch.ones(64).double())


def test_values_do_not_depend_on_the_tokens_beside_them():
    dense, plan = torch.randn(40, 3, 300), torch.randn(40, 3, 300)
    ids = torch.randint(0, 300, (40, 3))
    for row in (0, 17, 39):
        alone = kl(dense[row], plan[row])
        torch.testing.assert_close(alone, kl(dense, plan)[row], rtol=1e-6, atol=1e-9)
        assert torch.equal(nll(plan[row], ids[row]), nll(plan, ids)[row])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_values_that_are_not(broken):
    dense, plan = torch.randn(2, 9), torch.randn(2, 9)
    plan[1, 4] = broken
    assert kl(dense, plan).isfinite().tolist() == [True, False]
    assert nll(plan, torch.tensor([0, 0])).isfinite().tolist() == [True, False]
