"""DART (arXiv:2502.11494): keep a few pivots, and the tokens that duplicate them least.

The paper picks pivots by the norm of their keys in an early block of the language model and reports
that the choice of pivots hardly matters. Here, before the language model, a pivot is a token of
largest norm (project default). As in the paper's code, pivots are visual and textual; every pivot
gets an equal part of the budget, and takes the remaining tokens least similar to it.
Shapes: N = visual tokens, M = text tokens, P = pivots, K = tokens kept, D = hidden size.
"""

from __future__ import annotations

import torch

from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import best, fixed_point, unit_rows, widen

NUM_VISUAL_PIVOTS = 4
NUM_TEXT_PIVOTS = 4


def least_duplicated(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Indices of the kept tokens, ascending, ``(min(num_keep, N),)``."""
    num_keep = min(num_keep, pool.num_tokens)
    pivots_P = best(widen(pool.visual_ND).norm(dim=1), min(NUM_VISUAL_PIVOTS, num_keep))
    texts_P = best(widen(pool.text_MD).norm(dim=1), NUM_TEXT_PIVOTS)
    units_ND = unit_rows(pool.visual_ND)
    pivots_PD = torch.cat(
        [units_ND[pivots_P], unit_rows(pool.text_MD)[texts_P].to(units_ND.device)]
    )
    kept_N = torch.zeros(pool.num_tokens, dtype=torch.bool, device=units_ND.device)
    kept_N[pivots_P] = True
    num_left, num_pivots = num_keep - len(pivots_P), len(pivots_PD)
    for number, pivot_D in enumerate(pivots_PD):
        quota = num_left // num_pivots + (number < num_left % num_pivots)
        unlike_N = -fixed_point(units_ND @ pivot_D)
        kept_N[best(unlike_N.masked_fill(kept_N, torch.iinfo(torch.int64).min), quota)] = True
    return kept_N.nonzero()[:, 0]
