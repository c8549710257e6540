"""CDPruner (arXiv:2506.10967): maximise conditional diversity with a determinantal point process.

The paper's kernel is diag(r) L diag(r): L has the cosines between visual tokens, r has the
relevance of every token to the instruction, scaled to 0..1. A subset's determinant grows with both;
its greedy maximum is found with Chen et al.'s incremental Cholesky rows (arXiv:1709.05135), one
kernel row per step, so no N x N matrix exists. The paper takes relevance from CLIP's text encoder.
Here it is the mean cosine with the prompt's text embeddings in the language model's input space,
because the served model holds no text encoder (project default).
Shapes: N = tokens, M = text tokens, K = tokens kept, D = hidden size.
"""

from __future__ import annotations

import torch

from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import best, fixed_point, unit_rows

_FLOOR = 1e-6


def conditional_diversity(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Indices of the kept tokens, ascending, ``(min(num_keep, N),)``.

    If the remaining tokens add no volume (duplicates, or more tokens than dimensions), the most
    relevant of them are kept (project default).
    """
    num_keep = min(num_keep, pool.num_tokens)
    units_ND = unit_rows(pool.visual_ND)
    relevance_N = relevance(units_ND, pool.text_MD)
    rows_ND = units_ND * relevance_N[:, None]
    gain_N = rows_ND.square().sum(dim=1)
    cholesky_KN = gain_N.new_zeros(num_keep, pool.num_tokens)
    taken_N = torch.zeros_like(gain_N, dtype=torch.bool)
    for step in range(num_keep):
        index = fixed_point(gain_N).masked_fill(taken_N, -1).argmax()
        if fixed_point(gain_N[index]) <= 0:
            left_N = relevance_N.masked_fill(taken_N, -torch.inf)
            taken_N[best(left_N, num_keep - step)] = True
            break
        taken_N[index] = True
        overlap_N = cholesky_KN[:step].T @ cholesky_KN[:step, index]
        row_N = (rows_ND @ rows_ND[index] - overlap_N) / gain_N[index].sqrt()
        cholesky_KN[step] = row_N
        gain_N = (gain_N - row_N.square()).clamp_min(0.0)
    return taken_N.nonzero()[:, 0]


def relevance(units_ND: torch.Tensor, text_MD: torch.Tensor) -> torch.Tensor:
    """Mean cosine to the text, scaled to 1e-6..1, ``(N,)``; all 1 if the text prefers no token."""
    if text_MD.shape[0] == 0 or units_ND.shape[0] == 0:
        return units_ND.new_ones(units_ND.shape[0])
    raw_N = units_ND @ unit_rows(text_MD).to(units_ND.device).mean(dim=0)
    low, high = raw_N.min(), raw_N.max()
    if fixed_point(high - low) == 0:
        return torch.ones_like(raw_N)
    return ((raw_N - low) / (high - low)).clamp_min(_FLOOR)
