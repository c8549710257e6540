"""DivPrune (arXiv:2503.02175): maximise the smallest distance between two kept tokens, greedily.

Distance is 1 - cosine. The first token is the one whose nearest neighbour is farthest away; every
further one is the token farthest from all chosen ones. The first choice needs all pairs once; they
are computed in strips, so that memory stays at N x strip.
Shapes: N = tokens, K = tokens kept, S = tokens of a strip.
"""

from __future__ import annotations

import torch

from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import fixed_point, unit_rows

_STRIP = 256
_NEVER = torch.iinfo(torch.int64).max


def max_min_distance(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Indices of the kept tokens, ascending, ``(min(num_keep, N),)``."""
    units_ND = unit_rows(pool.visual_ND)
    # Cosine to the nearest chosen token (at first: to the nearest other one); lower = farther.
    nearest_N = _nearest_other(units_ND)
    chosen: list[torch.Tensor] = []
    taken_N = torch.zeros_like(nearest_N, dtype=torch.bool)
    for step in range(min(num_keep, pool.num_tokens)):
        index = nearest_N.masked_fill(taken_N, _NEVER).argmin()
        chosen.append(index)
        taken_N[index] = True
        cosine_N = fixed_point(units_ND @ units_ND[index])
        nearest_N = torch.maximum(nearest_N, cosine_N) if step else cosine_N
    return torch.stack(chosen).sort().values if chosen else taken_N.nonzero()[:, 0]


def _nearest_other(units_ND: torch.Tensor) -> torch.Tensor:
    """Cosine of every token to its most similar other token, in fixed point, ``(N,)``."""
    strips = []
    for start in range(0, units_ND.shape[0], _STRIP):
        cosines_SN = fixed_point(units_ND[start : start + _STRIP] @ units_ND.T)
        rows_S = torch.arange(cosines_SN.shape[0], device=cosines_SN.device)
        cosines_SN[rows_S, rows_S + start] = -_NEVER
        strips.append(cosines_SN.amax(dim=1))
    return torch.cat(strips) if strips else torch.zeros(0, dtype=torch.int64)
