"""Sampling: the next token of many sequences at once, every one with its own parameters.

The noise of an answer token is one number that depends only on ``(seed, index of the token)``. So a
token never depends on its neighbours in the batch, and a replayed request continues as it would
have without the interruption.
Shapes: B = sequences, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayapp.engine.request import TokenLogprobs
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.likelihood import log_softmax64


def noise(seed: int, index: int) -> float:
    """The uniform number in [0, 1) that decides token ``index``: Philox, keyed by ``seed``."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())


def choose_tokens(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]
) -> list[int]:
    """Choose one token id per row.

    Rows with ``temperature`` 0 take the largest logit, ties go to the lowest id. The others are
    drawn from ``softmax(logits / temperature)`` in float64, cut to ``top_k`` and then ``top_p``.

    Args:
        logits_BV: Logits as the model computed them.
        params: Sampling parameters of every row.
        indices: Index of the token within its answer, for every row.
    """
    chosen: list[int] = logits_BV.argmax(dim=-1).tolist()
    drawn = [row for row, p in enumerate(params) if p.temperature > 0.0]
    if drawn:
        tokens = _draw(
            logits_BV[drawn].double(),
            [params[row] for row in drawn],
            [noise(params[row].seed, indices[row]) for row in drawn],
        )
        for row, token in zip(drawn, tokens, strict=True):
            chosen[row] = token
    return chosen


def _draw(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """Draw by inverting the cumulative distribution, over tokens sorted by falling probability.

    Equal probabilities are sorted by token id, lowest first.
    """
    values_BV, order_BV = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    temperature_B1 = _column([p.temperature for p in params], logits_BV)
    scaled_BV = (values_BV - values_BV[:, :1]) / temperature_B1
    vocab_size = logits_BV.shape[1]
    top_k_B1 = _column([p.top_k or vocab_size for p in params], logits_BV)
    rank_V = torch.arange(vocab_size, device=logits_BV.device)
    probabilities_BV = torch.softmax(scaled_BV.masked_fill(rank_V >= top_k_B1, -torch.inf), dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    # A token stays while the tokens before it have not reached top_p, so the first always stays.
    top_p_B1 = _column([p.top_p for p in params], logits_BV)
    probabilities_BV = probabilities_BV.masked_fill((before_BV >= top_p_B1) & (rank_V > 0), 0.0)
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    target_B1 = _column(uniforms, logits_BV) * cumulative_BV[:, -1:]
    picked_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = (probabilities_BV > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    tokens: list[int] = order_BV.gather(1, torch.minimum(picked_B1, last_B1))[:, 0].tolist()
    return tokens


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def token_logprobs(
    logits_BV: torch.Tensor, token_ids: Sequence[int], params: Sequence[SamplingParams]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the chosen tokens under the unmodified logits, None for a row without.

    A token's own value and its value among the best are the same float.
    """
    results: list[TokenLogprobs | None] = [None] * len(token_ids)
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return results
    for row, logprobs_V in zip(rows, log_softmax64(logits_BV[rows]), strict=True):
        best = params[row].logprobs or 0
        # A stable sort, because topk leaves open which of equal values comes first.
        order_V = torch.sort(logprobs_V, descending=True, stable=True).indices[:best]
        top = tuple(zip(order_V.tolist(), logprobs_V[order_V].tolist(), strict=True))
        results[row] = TokenLogprobs(float(logprobs_V[token_ids[row]]), top)
    return results
