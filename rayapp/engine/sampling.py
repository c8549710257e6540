"""Sampling: the next token of many sequences at once, every one with its own parameters.

Everything is computed where the logits lie and comes over in one transfer: tokens, whether they
are certain, and the log-probabilities that were asked for. If all rows are greedy and none asks for
log-probabilities, one argmax is all. The vocabulary is never sorted, unless the likeliest tokens of
a row cannot decide it; such rows are done again.

The noise of an answer token is one number that depends only on ``(seed, index of the token)``. So a
token never depends on its neighbours in the batch, and a replayed request continues as it would
have without the interruption.
Shapes: B = sequences, V = vocabulary, C = the likeliest tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayapp.engine.adjustment import Adjustment, adjusted
from rayapp.engine.request import TokenLogprobs
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.likelihood import log_softmax64

# Tokens that are sorted before all others: enough for most draws, and cheap.
_SORTED_FIRST = 512

Sampled = tuple[list[int], list[TokenLogprobs | None]]
"""The token of every row, and its log-probabilities where they were asked for."""


def noise(seed: int, index: int) -> float:
    """The uniform number in [0, 1) that decides token ``index``: Philox, keyed by ``seed``."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())


def sample(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    indices: Sequence[int],
    adjustments: Sequence[Adjustment | None] = (),
) -> Sampled:
    """Choose one token per row, and look up the log-probabilities that rows ask for.

    Rows with ``temperature`` 0 take the largest logit, ties go to the lowest id. The others are
    drawn from ``softmax(logits / temperature)`` in float64, cut to ``top_k`` and then ``top_p``.
    Log-probabilities are those of the unmodified logits; a token's own value and its value among
    the best are the same float.

    Args:
        logits_BV: Logits as the model computed them.
        params: Sampling parameters of every row.
        indices: Index of the token within its answer, for every row.
        adjustments: What rows change in the logits before a token is chosen; none without.
    """
    uniforms = [
        noise(p.seed, index) if p.temperature > 0.0 else None
        for p, index in zip(params, indices, strict=True)
    ]
    chosen_from_BV = adjusted(logits_BV, adjustments)
    count = min(_SORTED_FIRST, logits_BV.shape[1])
    return _sample(logits_BV, chosen_from_BV, params, uniforms, count)


def _sample(
    logits_BV: torch.Tensor,
    chosen_from_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float | None],
    count: int,
) -> Sampled:
    """Sample from the ``count`` likeliest tokens, and rows that these cannot decide from all."""
    scored = [row for row, p in enumerate(params) if p.logprobs is not None]
    most = min(max((params[row].logprobs or 0 for row in scored), default=0), logits_BV.shape[1])
    tokens_B, sure_B = _choose(chosen_from_BV, params, uniforms, count)
    parts = [tokens_B] if sure_B is None else [tokens_B.double(), sure_B.double()]
    if scored:
        parts += [_log_probabilities(logits_BV[scored], tokens_B[scored], most, count).flatten()]
    numbers = torch.cat(parts).tolist()
    size = len(params)
    tokens = [int(token) for token in numbers[:size]]
    sure = [True] * size if sure_B is None else [bool(flag) for flag in numbers[size : 2 * size]]
    logprobs: list[TokenLogprobs | None] = [None] * size
    for place, row in enumerate(scored):
        start = len(numbers) - (len(scored) - place) * (2 + 2 * most)
        fields = numbers[start : start + 2 + 2 * most]
        sure[row] &= bool(fields[0])
        logprobs[row] = _entry(fields[1:], most, min(params[row].logprobs or 0, most))
    open_rows = [row for row in range(size) if not sure[row]]
    if open_rows:
        again = _sample(
            logits_BV[open_rows],
            chosen_from_BV[open_rows],
            [params[row] for row in open_rows],
            [uniforms[row] for row in open_rows],
            logits_BV.shape[1],
        )
        for row, token, entry in zip(open_rows, *again, strict=True):
            tokens[row], logprobs[row] = token, entry
    return tokens, logprobs


def _entry(fields: Sequence[float], most: int, num_best: int) -> TokenLogprobs:
    values, ids = fields[1 : 1 + num_best], fields[1 + most : 1 + most + num_best]
    return TokenLogprobs(fields[0], tuple(zip(map(int, ids), values, strict=True)))


def _choose(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float | None],
    count: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A token per row, and whether it is certain; None if all are."""
    # Of equal ones both give the first; on CPUs `argmax` takes five times as long in bf16.
    tokens_B = logits_BV.max(dim=-1).indices
    drawn = [row for row, uniform in enumerate(uniforms) if uniform is not None]
    if not drawn:
        return tokens_B, None
    rows = torch.tensor(drawn, device=logits_BV.device)
    drawn_B, drawn_sure_B = _draw(
        logits_BV if len(drawn) == len(params) else logits_BV[rows],
        [params[row] for row in drawn],
        [uniform for uniform in uniforms if uniform is not None],
        count,
    )
    sure_B = torch.ones_like(tokens_B, dtype=torch.bool).index_copy_(0, rows, drawn_sure_B)
    return tokens_B.index_copy(0, rows, drawn_B), sure_B


def _draw(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw every row from its ``count`` likeliest tokens by inverting the cumulative distribution.

    They decide a row if all that ``top_k`` and ``top_p`` leave is among them, or if the draw falls
    among them anyway. A row's result does not depend on the other rows.

    Returns:
        The tokens ``(B,)``, and whether each is the one that all tokens would have given.
    """
    vocab_size = logits_BV.shape[1]
    logits_BC, order_BC, is_open_BC = _best(logits_BV, count)
    values_BC = logits_BC.double()
    temperature_B1, top_p_B1, uniform_B1, top_k_B1 = (
        torch.tensor(
            [
                [p.temperature, p.top_p, uniform, p.top_k or vocab_size]
                for p, uniform in zip(params, uniforms, strict=True)
            ],
            dtype=torch.float64,
        )
        .to(logits_BV.device)
        .split(1, dim=1)
    )
    rank_C = torch.arange(count, device=logits_BV.device)
    weights_BC = ((values_BC - values_BC[:, :1]) / temperature_B1).exp()
    weights_BC = weights_BC.masked_fill(rank_C >= top_k_B1, 0.0)
    cumulative_BC = weights_BC.cumsum(dim=-1)
    mass_B1, holds_all_B1 = cumulative_BC[:, -1:], top_k_B1 <= count
    if any(not 0 < p.top_k <= count for p in params) and count < vocab_size:
        all_BV = logits_BV.double().sub_(values_BC[:, :1]).div_(temperature_B1).exp_()
        mass_B1 = torch.where(holds_all_B1, mass_B1, all_BV.sum(-1, keepdim=True))
    # A token stays while the tokens before it have not reached top_p, so the first always stays.
    is_left_BC = (cumulative_BC - weights_BC < top_p_B1 * mass_B1) | (rank_C == 0)
    kept_BC = weights_BC.masked_fill(~is_left_BC, 0.0)
    ends_B1 = holds_all_B1 | ~is_left_BC.all(dim=-1, keepdim=True)
    kept_mass_B1 = torch.where(ends_B1, kept_BC.sum(-1, keepdim=True), mass_B1)
    picked_B1 = torch.searchsorted(kept_BC.cumsum(dim=-1), uniform_B1 * kept_mass_B1, right=True)
    last_B1 = (kept_BC > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    # Where more tokens are left than were sorted, their mass is known only if it is all mass.
    has_all_mass_B1 = (top_k_B1 >= vocab_size) & (top_p_B1 >= 1.0)
    is_known_B1 = holds_all_B1 | (has_all_mass_B1 & (picked_B1 <= last_B1))
    is_known_B1 |= ends_B1 & (top_k_B1 >= vocab_size)
    place_B1 = torch.minimum(picked_B1, last_B1)
    is_known_B1 &= ~is_open_BC.gather(1, place_B1)
    return order_BC.gather(1, place_B1)[:, 0], is_known_B1[:, 0]


def _best(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``count`` largest logits of every row, their ids, and which of these are not certain.

    Equal ones come by rising id. Those equal to the least are not certain if there are more of
    them than fit: which of them ``topk`` takes is open.
    """
    if count >= logits_BV.shape[1]:
        values_BC, ids_BC = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
        return values_BC, ids_BC, torch.zeros_like(values_BC, dtype=torch.bool)
    ids_BC = torch.topk(logits_BV, count, dim=-1).indices.sort(dim=-1).values
    values_BC, place_BC = torch.sort(
        logits_BV.gather(1, ids_BC), dim=-1, descending=True, stable=True
    )
    is_least_BC = values_BC == values_BC[:, -1:]
    num_equal_B1 = (logits_BV == values_BC[:, -1:]).sum(dim=-1, keepdim=True)
    is_open_BC = is_least_BC & (num_equal_B1 > is_least_BC.sum(dim=-1, keepdim=True))
    return values_BC, ids_BC.gather(1, place_BC), is_open_BC


def prompt_logprobs(
    logits_TV: torch.Tensor, next_tokens: Sequence[int], num_best: int
) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens, each of which follows the token of its row.

    Args:
        logits_TV: Logits after every token of a text.
        next_tokens: The tokens that follow them.
        num_best: Alternatives to report beside each.
    """
    tokens_T = torch.tensor(next_tokens, device=logits_TV.device)
    vocab_size = logits_TV.shape[1]
    most = min(num_best, vocab_size)
    count = min(_SORTED_FIRST, vocab_size) if most else 1
    rows = _log_probabilities(logits_TV, tokens_T, most, count).tolist()
    unsure = [number for number, row in enumerate(rows) if not row[0]]
    if unsure:
        again = _log_probabilities(logits_TV[unsure], tokens_T[unsure], most, vocab_size).tolist()
        for number, row in zip(unsure, again, strict=True):
            rows[number] = row
    return [_entry(row[1:], most, most) for row in rows]


def _log_probabilities(
    logits_BV: torch.Tensor, tokens_B: torch.Tensor, most: int, count: int
) -> torch.Tensor:
    """Rows of: whether all is certain, the token's value, the best values, and the best ids."""
    logprobs_BV = log_softmax64(logits_BV)
    values_BC, ids_BC, is_open_BC = _best(logprobs_BV, max(most, count))
    sure_B1 = ~is_open_BC[:, :most].any(dim=-1, keepdim=True)
    own_B1 = logprobs_BV.gather(1, tokens_B[:, None])
    return torch.cat(
        (sure_B1.double(), own_B1, values_BC[:, :most], ids_BC[:, :most].double()), dim=1
    )
