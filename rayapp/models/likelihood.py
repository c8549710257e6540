"""Likelihoods of logits: the only place where NLL and KL are computed.

At a KL of 6e-4, a log-softmax in float32 errs by 1.4e-5, and one in float64 over a vocabulary of
49,152 takes longer than the model. So neither is used for NLL and KL: both are written so that
nothing large is ever subtracted, and float32 suffices (:func:`kl_from`, :func:`nll`). Their errors
against float64 lie below the determinism bound ``1e-5 x value + 1e-7``; tests measure them. Logits
in float64 are computed in float64.
Shapes: C = continuation tokens (any leading shape works), V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

DenseLogits = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""One side of a KL, as :func:`dense_logits` makes it: logits ``(C, V)`` as they are, and of each
token the log of their normaliser, the sum of the probabilities that follow from it, and the
likeliest token, all ``(C,)``."""

_BLOCK_ELEMENTS = 1 << 16
"""Number of logits that are worked on at a time on a CPU, so that they stay in its cache."""
_DEVICE_BLOCK_ELEMENTS = 1 << 24
"""The same on other devices, where a call costs more than the elements."""


SLICE_ELEMENTS = 1 << 23
"""Number of logits that exist at one time: 32 MB in float32 (project default)."""


def slice_tokens(vocab_size: int) -> int:
    """Number of tokens that meet the head together, so that the memory of logits is bounded."""
    return max(1, SLICE_ELEMENTS // vocab_size)


def log_softmax64(logits_CV: torch.Tensor) -> torch.Tensor:
    """Natural-log probabilities, float64, same shape."""
    return torch.log_softmax(logits_CV.double(), dim=-1)


def nll(logits_CV: torch.Tensor, token_ids_C: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token in nats, shape ``(C,)``, float64.

    It is the token's distance to the likeliest one, plus ``log1p`` of all others' mass in units of
    the likeliest: both terms are positive and exact to float32, however small they are.
    """
    flat_CV = logits_CV.flatten(0, -2)
    ids_C1 = token_ids_C.flatten()[:, None].to(logits_CV.device)
    parts = [logits_CV.new_zeros(0, dtype=torch.float64)]
    for rows in _blocks(flat_CV):
        part_CV = _wide(flat_CV[rows])
        best_C1, place_C1 = part_CV.max(dim=-1, keepdim=True)
        gap_C = (best_C1 - part_CV.gather(-1, ids_C1[rows]))[:, 0]
        others_C = (part_CV - best_C1).exp_().scatter_(-1, place_C1, 0.0).sum(dim=-1)
        parts.append(gap_C.double() + others_C.double().log1p())
    return torch.cat(parts).view(logits_CV.shape[:-1])


def dense_logits(logits_CV: torch.Tensor) -> DenseLogits:
    """The first side of a KL, ready to be compared with any number of others.

    It keeps the logits in their own element type and three numbers a token: probabilities are made
    again for every comparison, which costs less than it costs to keep them.
    """
    shape = logits_CV.shape[:-1]
    norms_C, totals_C = (_wide(logits_CV.new_zeros(shape)).flatten() for _ in range(2))
    likeliest_C = torch.zeros_like(norms_C, dtype=torch.int64)
    flat_CV = logits_CV.flatten(0, -2)
    for rows in _blocks(flat_CV):
        part_CV = _wide(flat_CV[rows])
        norms_C[rows] = part_CV.logsumexp(dim=-1)
        totals_C[rows] = _probabilities(part_CV, norms_C[rows]).sum(dim=-1)
        likeliest_C[rows] = part_CV.argmax(dim=-1)
    return logits_CV, norms_C.view(shape), totals_C.view(shape), likeliest_C.view(shape)


def kl(dense_logits_CV: torch.Tensor, plan_logits_CV: torch.Tensor) -> torch.Tensor:
    """KL(dense || plan) of each token's distribution in nats, shape ``(C,)``, float64."""
    return kl_from(dense_logits(dense_logits_CV), plan_logits_CV)


def kl_from(dense: DenseLogits, plan_logits_CV: torch.Tensor) -> torch.Tensor:
    """KL of each token's distribution to that of ``plan_logits_CV`` in nats, ``(C,)``, float64.

    With p the dense probabilities and x the differences of logits minus their mean under p,
    ``KL = log1p(sum p expm1(x)) - sum p x``, whose terms are of the size of the KL. The likeliest
    token's difference is taken off first, so that a common shift of the logits falls out before
    anything is rounded. Where ``expm1`` overflows (a KL beyond 80), float64 is used.
    """
    dense_CV, plan_CV = dense[0].flatten(0, -2), plan_logits_CV.flatten(0, -2)
    norms_C, totals_C, likeliest_C = (tensor.flatten() for tensor in dense[1:])
    parts = [plan_CV.new_zeros(0, dtype=torch.float64)]
    for rows in _blocks(plan_CV):
        part_CV, other_CV, likeliest_C1 = dense_CV[rows], plan_CV[rows], likeliest_C[rows, None]
        shift_C1 = _wide(other_CV.gather(-1, likeliest_C1)) - part_CV.gather(-1, likeliest_C1)
        gaps_CV = torch.sub(_wide(other_CV), shift_C1).sub_(part_CV)
        probs_CV = _probabilities(_wide(part_CV), norms_C[rows])
        # Probabilities in float32 do not quite sum up to 1: their sum is divided out.
        gaps_CV.sub_((_weighted_sum(probs_CV, gaps_CV) / totals_C[rows])[:, None])
        mean_C = _weighted_sum(probs_CV, gaps_CV).double() / totals_C[rows]
        growth_C = _weighted_sum(probs_CV, gaps_CV.expm1_()).double() / totals_C[rows]
        part_C = growth_C.log1p() - mean_C
        if not part_C.isfinite().all():
            part_C = kl_of(log_softmax64(part_CV), log_softmax64(other_CV))
        parts.append(part_C)
    return torch.cat(parts).view(plan_logits_CV.shape[:-1])


def _weighted_sum(weights_CV: torch.Tensor, values_CV: torch.Tensor) -> torch.Tensor:
    if len(weights_CV) == 1:
        return torch.dot(weights_CV[0], values_CV[0])[None]
    return torch.bmm(weights_CV[:, None], values_CV[:, :, None])[:, 0, 0]


def _probabilities(wide_CV: torch.Tensor, norms_C: torch.Tensor) -> torch.Tensor:
    return torch.sub(wide_CV, norms_C[:, None]).exp_()


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, or in float64 if they are that already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _blocks(logits_CV: torch.Tensor) -> Iterator[slice]:
    most = _BLOCK_ELEMENTS if logits_CV.device.type == "cpu" else _DEVICE_BLOCK_ELEMENTS
    step = max(1, most // logits_CV.shape[-1])
    return (slice(start, start + step) for start in range(0, len(logits_CV), step))


def kl_of(dense_logprobs_CV: torch.Tensor, plan_logprobs_CV: torch.Tensor) -> torch.Tensor:
    """KL of log-probabilities that are already at hand, ``(C,)``."""
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
    mass of the other tokens times the KL between the two distributions among them. It needs the
    whole log-softmax in float64, so it saves memory only, and costs more time than the exact KL.
    """
    top_CK, ids_CK, others_C = dense
    plan_CV = log_softmax64(plan_logits_CV)
    within_C = kl_of(top_CK, plan_CV.gather(-1, ids_CK))
    mass_C = others_C.exp()
    gap_C = others_C - _others(plan_CV, ids_CK)
    return within_C + torch.where(mass_C > 0, mass_C * gap_C, 0.0)


def _others(logprobs_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    return logprobs_CV.scatter(-1, ids_CK, -torch.inf).logsumexp(-1)
