"""Likelihoods of logits: the only place where NLL and KL are computed, in float64.

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
    """Compute the same from log-probabilities that are already at hand."""
    return -logprobs_CV.gather(-1, token_ids_C[..., None].to(logprobs_CV.device)).squeeze(-1)


def kl(dense_logits_CV: torch.Tensor, plan_logits_CV: torch.Tensor) -> torch.Tensor:
    """KL(dense || plan) of each token's distribution in nats, shape ``(C,)``, float64."""
    return kl_of(log_softmax64(dense_logits_CV), log_softmax64(plan_logits_CV))


def kl_of(dense_logprobs_CV: torch.Tensor, plan_logprobs_CV: torch.Tensor) -> torch.Tensor:
    """Compute the same from log-probabilities that are already at hand."""
    return (dense_logprobs_CV.exp() * (dense_logprobs_CV - plan_logprobs_CV)).sum(-1)


def top_k(logits_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduce every distribution to its ``k`` likeliest tokens and one outcome for all others.

    Returns:
        Log-probabilities ``(C, k)`` and token ids ``(C, k)`` of the likeliest tokens, likeliest
        first, and the log-probability ``(C,)`` of all others together (-inf where there are none).
    """
    logprobs_CV = log_softmax64(logits_CV)
    top_CK, ids_CK = logprobs_CV.topk(min(k, logprobs_CV.shape[-1]), dim=-1)
    return top_CK, ids_CK, _others(logprobs_CV, ids_CK)


def kl_top_k(
    dense: tuple[torch.Tensor, torch.Tensor, torch.Tensor], plan_logits_CV: torch.Tensor
) -> torch.Tensor:
    """KL(dense || plan) over the outcomes that :func:`top_k` tells apart, ``(C,)``, float64.

    The result never exceeds the exact KL (data processing). The difference is exactly the dense
    mass of the other tokens times the KL between the two distributions among them.
    """
    top_CK, ids_CK, others_C = dense
    plan_CV = log_softmax64(plan_logits_CV)
    within_C = kl_of(top_CK, plan_CV.gather(-1, ids_CK))
    mass_C = others_C.exp()
    gap_C = others_C - _others(plan_CV, ids_CK)
    return within_C + torch.where(mass_C > 0, mass_C * gap_C, 0.0)


def _others(logprobs_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    return logprobs_CV.scatter(-1, ids_CK, -torch.inf).logsumexp(-1)
