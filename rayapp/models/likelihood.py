"""Logits to likelihoods: the only place for NLL and KL, in float64.

At a KL of 6e-4, a float32 reduction alone errs by 1.4e-5; hence float64 throughout.
Shapes: C = continuation tokens (any leading shape works), V = vocabulary.
"""

from __future__ import annotations

import torch


def log_softmax64(logits_CV: torch.Tensor) -> torch.Tensor:
    """Natural-log probabilities, float64, same shape."""
    return torch.log_softmax(logits_CV.double(), dim=-1)


def nll(logits_CV: torch.Tensor, token_ids_C: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token in nats, shape ``(C,)``, float64."""
    return nll_of(log_softmax64(logits_CV), token_ids_C)


def nll_of(logprobs_CV: torch.Tensor, token_ids_C: torch.Tensor) -> torch.Tensor:
    """The same from log-probabilities that are already at hand."""
    return -logprobs_CV.gather(-1, token_ids_C[..., None].to(logprobs_CV.device)).squeeze(-1)


def kl(dense_logits_CV: torch.Tensor, plan_logits_CV: torch.Tensor) -> torch.Tensor:
    """KL(dense || plan) of each token's distribution in nats, shape ``(C,)``, float64."""
    return kl_of(log_softmax64(dense_logits_CV), log_softmax64(plan_logits_CV))


def kl_of(dense_logprobs_CV: torch.Tensor, plan_logprobs_CV: torch.Tensor) -> torch.Tensor:
    """The same from log-probabilities that are already at hand."""
    return (dense_logprobs_CV.exp() * (dense_logprobs_CV - plan_logprobs_CV)).sum(-1)
