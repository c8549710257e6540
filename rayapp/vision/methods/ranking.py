"""Comparisons that do not depend on rounding: cosines in fixed point, ties to the lowest index.

Sums of floats depend on the order in which a kernel adds, so equal tokens could get unequal scores.
Here cosines are rounded to multiples of 2^-32 and then added as integers: sums are exact, tokens
that differ by less than that are ties, and a row gets the same result in a batch as alone.
The arithmetic before it is float64 on a CPU, float32 on a GPU, where float64 would cost more than
the selection may (project default); near ties may fall differently there.
Shapes: N = tokens, D = hidden size, K = tokens kept; ``...`` = any batch dimensions.
"""

from __future__ import annotations

import torch

_UNIT = 2.0**32
# A row shorter than this has no direction and is treated as zero.
_SHORTEST = 1e-18


def widen(rows: torch.Tensor) -> torch.Tensor:
    """Convert values to the type in which selections are computed."""
    return rows.to(torch.float32 if rows.is_cuda else torch.float64)


def unit_rows(rows_ND: torch.Tensor) -> torch.Tensor:
    """Scale rows to length 1, ``(..., N, D)``; a zero row stays zero, so all its cosines are 0."""
    wide_ND = widen(rows_ND)
    lengths_N1 = wide_ND.norm(dim=-1, keepdim=True)
    return torch.where(lengths_N1 > _SHORTEST, wide_ND / lengths_N1.clamp_min(_SHORTEST), 0.0)


def fixed_point(values: torch.Tensor) -> torch.Tensor:
    """Round values to whole multiples of 2^-32, int64."""
    return (values * _UNIT).round().to(torch.int64)


def best(scores_N: torch.Tensor, num_keep: int) -> torch.Tensor:
    """Indices of the highest scores, ascending, ``(..., min(num_keep, N))``; higher = keep."""
    order_N = torch.sort(scores_N, dim=-1, descending=True, stable=True).indices
    return order_N[..., :num_keep].sort(dim=-1).values


def even_steps(total: int, count: int) -> torch.Tensor:
    """Choose ``count`` of the numbers ``0..total-1``, evenly spread, centred, ascending, int64."""
    return (2 * torch.arange(count) + 1) * total // (2 * max(count, 1))
