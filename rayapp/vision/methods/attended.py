"""The tokens that the tower's CLS token, or the prompt's last token, attends to most.

- CLS attention: FasterVLM (arXiv:2412.01818) keeps the tokens with the highest [CLS] attention in
  the block whose output the projector takes, averaged over heads; they are the dominant tokens of
  VisionZip (arXiv:2412.04467), whose merged contextual tokens are no subset and left out here.
- FastV (arXiv:2403.06764) keeps the image tokens with the highest attention from the last token in
  block K of the language model (the paper's K = 2). Unlike the paper, which drops them from block K
  on, the kept tokens here are all that any block sees, so that every block's KV is equally short
  (project default).

:mod:`rayapp.vision.attention` computes both scores.
Shapes: N = tokens.
"""

from __future__ import annotations

import torch

from rayapp.errors import IntegrityError
from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import best


def cls_attended(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Indices of the kept tokens, ascending; needs ``cls_attention_N`` of the pool."""
    return best(_present(pool.cls_attention_N, "cls_attention_N"), num_keep)


def text_attended(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Indices of the kept tokens, ascending; needs ``text_attention_N`` of the pool."""
    return best(_present(pool.text_attention_N, "text_attention_N"), num_keep)


def _present(scores_N: torch.Tensor | None, name: str) -> torch.Tensor:
    if scores_N is None:
        raise IntegrityError(f"this method ranks by {name}, but the pool was made without it")
    return scores_N
