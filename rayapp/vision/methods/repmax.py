"""RepMax: the second stage of TrimTokenator (arXiv:2509.00320), alone the diversity baseline.

The choice is greedy: start with the token of lowest mean cosine similarity to all, then add the one
with the lowest mean cosine similarity to those chosen. The sum of cosines to the chosen is kept up
to date, so a step costs one pass over the tokens and no N x N matrix exists.
Shapes: B = images, N = tokens, D = hidden size, K = tokens kept.
"""

from __future__ import annotations

import torch

from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import fixed_point, unit_rows

_NEVER = torch.iinfo(torch.int64).max


def repmax(
    visual_BND: torch.Tensor, num_keep: int, allowed_BN: torch.Tensor | None = None
) -> torch.Tensor:
    """Indices ``(B, K)`` in the order in which they were chosen.

    Args:
        visual_BND: Tokens of B images.
        num_keep: K, the tokens to choose; every image allows at least that many.
        allowed_BN: Bool mask of the tokens that may be chosen; the first mean runs over them.
    """
    units_BND = unit_rows(visual_BND)
    if allowed_BN is not None:
        units_BND = units_BND * allowed_BN[..., None]
    barred_BN = torch.zeros(units_BND.shape[:2], dtype=torch.bool, device=units_BND.device)
    barred_BN |= barred_BN if allowed_BN is None else ~allowed_BN
    similarity_BN = _cosines(units_BND, units_BND.sum(dim=1))
    chosen: list[torch.Tensor] = []
    for step in range(num_keep):
        index_B1 = similarity_BN.masked_fill(barred_BN, _NEVER).argmin(dim=1, keepdim=True)
        chosen.append(index_B1)
        barred_BN.scatter_(1, index_B1, True)
        token_BD = units_BND.take_along_dim(index_B1[..., None], dim=1)[:, 0]
        added_BN = _cosines(units_BND, token_BD)
        similarity_BN = similarity_BN + added_BN if step else added_BN
    return torch.cat(chosen, dim=1)


def _cosines(units_BND: torch.Tensor, direction_BD: torch.Tensor) -> torch.Tensor:
    return fixed_point(torch.bmm(units_BND, direction_BD[..., None])[..., 0])


def most_diverse(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Indices that RepMax chooses from all tokens of a pool, ascending."""
    kept_K = repmax(pool.visual_ND[None], min(num_keep, pool.num_tokens))[0]
    return kept_K.sort().values
