from __future__ import annotations

import math

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


def test_float64_keeps_small_divergences():
    logits = torch.randn(64, 5000)
    other = logits + 1e-3 * torch.randn(64, 5000)
    want = torch.nn.functional.kl_div(
        other.double().log_softmax(-1),
        logits.double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    torch.testing.assert_close(kl(logits, other), want, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(log_softmax64(logits).exp().sum(-1), torch.ones(64).double())
