"""The sampling that came before one pass over the batch: the reference of its tests.

The noise of an answer token is one number that depends only on ``(seed, index of the token)``. So a
token never depends on its neighbours in the batch, and a replayed request continues as it would
have without the interruption.
Shapes: B = sequences, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayapp.engine.request import TokenLogprobs
from rayapp.engine.sampling import noise
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.likelihood import log_softmax64

# Tokens that are sorted before all others: enough for most draws, and cheap.
_SORTED_FIRST = 512


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
            logits_BV[drawn],
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

    Sorting a large vocabulary costs more than a decode step of a small model, so the likeliest
    tokens alone are sorted first; a row that they cannot decide is drawn from all tokens.
    """
    vocab_size = logits_BV.shape[1]
    drawn = _draw_from_best(logits_BV, min(_SORTED_FIRST, vocab_size), params, uniforms)
    open_rows = [row for row, token in enumerate(drawn) if token is None]
    if open_rows:
        again = _draw_from_best(
            logits_BV[open_rows],
            vocab_size,
            [params[row] for row in open_rows],
            [uniforms[row] for row in open_rows],
        )
        for row, token in zip(open_rows, again, strict=True):
            drawn[row] = token
    return [token for token in drawn if token is not None]


def _draw_from_best(
    logits_BV: torch.Tensor,
    count: int,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
) -> list[int | None]:
    """Draw every row from its ``count`` likeliest tokens; None where one after them may be due.

    They decide a row if all that ``top_k`` and ``top_p`` leave is among them, or if the draw falls
    among them anyway. A row's result does not depend on the other rows.
    """
    vocab_size = logits_BV.shape[1]
    values_BC, order_BC = _best(logits_BV, count)
    values_BC = values_BC.double()
    temperature_B1 = _column([p.temperature for p in params], logits_BV)
    top_k_B1 = _column([p.top_k or vocab_size for p in params], logits_BV)
    rank_C = torch.arange(count, device=logits_BV.device)
    weights_BC = ((values_BC - values_BC[:, :1]) / temperature_B1).exp()
    weights_BC = weights_BC.masked_fill(rank_C >= top_k_B1, 0.0)
    cumulative_BC = weights_BC.cumsum(dim=-1)
    mass_B1, holds_all_B1 = cumulative_BC[:, -1:], top_k_B1 <= count
    if count < vocab_size:
        all_BV = logits_BV.double().sub_(values_BC[:, :1]).div_(temperature_B1).exp_()
        all_B1 = all_BV.sum(-1, keepdim=True)
        mass_B1 = torch.where(holds_all_B1, mass_B1, all_B1)
    # A token stays while the tokens before it have not reached top_p, so the first always stays.
    top_p_B1 = _column([p.top_p for p in params], logits_BV)
    is_left_BC = (cumulative_BC - weights_BC < top_p_B1 * mass_B1) | (rank_C == 0)
    kept_BC = weights_BC.masked_fill(~is_left_BC, 0.0)
    ends_B1 = holds_all_B1 | ~is_left_BC.all(dim=-1, keepdim=True)
    kept_mass_B1 = torch.where(ends_B1, kept_BC.sum(-1, keepdim=True), mass_B1)
    picked_B1 = torch.searchsorted(
        kept_BC.cumsum(dim=-1), _column(uniforms, logits_BV) * kept_mass_B1, right=True
    )
    last_B1 = (kept_BC > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    # Where more tokens are left than were sorted, their mass is known only if it is all mass.
    has_all_mass_B1 = (top_k_B1 >= vocab_size) & (top_p_B1 >= 1.0)
    is_known_B1 = holds_all_B1 | (has_all_mass_B1 & (picked_B1 <= last_B1))
    is_known_B1 |= ends_B1 & (top_k_B1 >= vocab_size)
    tokens_B = order_BC.gather(1, torch.minimum(picked_B1, last_B1))[:, 0].tolist()
    known_B = is_known_B1[:, 0].tolist()
    return [token if known else None for token, known in zip(tokens_B, known_B, strict=True)]


def _best(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest logits of every row and their ids, equal ones by rising id."""
    if count == logits_BV.shape[1]:
        return torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    # Which of equal values topk takes, and in which order, is open: lower ids are to come first.
    values_BC, ids_BC = torch.topk(logits_BV, count, dim=-1)
    least_B1 = values_BC[:, -1:]
    if bool(((logits_BV >= least_B1).sum(dim=-1) > count).any()):
        is_above_BV, is_least_BV = logits_BV > least_B1, logits_BV == least_B1
        missing_B1 = count - is_above_BV.sum(dim=-1, keepdim=True)
        is_taken_BV = is_above_BV | (is_least_BV & (is_least_BV.cumsum(dim=-1) <= missing_B1))
        ids_BC = is_taken_BV.nonzero()[:, 1].view(-1, count)
    ids_BC = ids_BC.sort(dim=-1).values
    values_BC, place_BC = torch.sort(
        logits_BV.gather(1, ids_BC), dim=-1, descending=True, stable=True
    )
    return values_BC, ids_BC.gather(1, place_BC)


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
