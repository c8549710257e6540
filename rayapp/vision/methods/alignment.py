"""Alignment with the text: the first stage of TrimTokenator (arXiv:2509.00320), alone a baseline.

The paper scores a visual token by -(1/M) sum_j ||v_i - t_j||^2 over the prompt's text embeddings, a
proxy for mutual information. That ranks as 2 v_i . sum_j t_j - M ||v_i||^2, which needs no N x M
matrix and is exact where the embeddings are whole numbers.
Shapes: N = visual tokens, M = text tokens, D = hidden size.
"""

from __future__ import annotations

import torch

from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import best, widen


def alignment_scores(visual_ND: torch.Tensor, text_MD: torch.Tensor) -> torch.Tensor:
    """Scores ``(N,)`` that rank as the paper's; higher = closer to the text.

    Without text all scores are zero: no token is then better aligned than another.
    """
    visual_ND = widen(visual_ND)
    num_text = text_MD.shape[0]
    text_D = widen(text_MD).sum(dim=0).to(visual_ND.device)
    return (visual_ND * (2.0 * text_D - num_text * visual_ND)).sum(dim=-1)


def most_aligned(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Indices of the tokens closest to the text, ascending; without text, of the first tokens."""
    return best(alignment_scores(pool.visual_ND, pool.text_MD), num_keep)
