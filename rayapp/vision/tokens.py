"""TrimTokenator (arXiv:2509.00320) selects few visual tokens that still represent an image.

It works after the projector, in the language model's input space: keep the ``num_aligned`` tokens
that are best aligned with the prompt's text, then the ``num_keep`` most diverse of them (RepMax),
and put them back in spatial order. Both stages are the paper's; the default of ``num_aligned``, 0.8
N, is a third party's choice (project default), as is the rule that without text there is nothing to
align with, so all tokens go on to the second stage.
Shapes: B = images, N = visual tokens, M = text tokens, D = hidden size, K = tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayapp.errors import IntegrityError, PlanError
from rayapp.plan import resolve
from rayapp.vision.methods.alignment import alignment_scores
from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import best
from rayapp.vision.methods.repmax import repmax

DEFAULT_ALIGNED = 0.8


def select_visual_tokens(
    visual_ND: torch.Tensor,
    text_MD: torch.Tensor,
    *,
    num_aligned: int | float | None = None,
    num_keep: int | float,
) -> torch.Tensor:
    """Keep the visual tokens that are aligned with the text and unlike each other.

    The alignment costs O(N D), and every kept token O(N D). Ties go to the lowest index. Tensors
    may have any floating type; see :mod:`rayapp.vision.methods.ranking` for the types of
    arithmetic.

    Args:
        visual_ND: Projected features of one image.
        text_MD: Embeddings of the user's words, without template, system or image tokens. With
            M = 0 the alignment stage is skipped.
        num_aligned: Tokens that survive the alignment stage, a count or a share of N (shares round
            up); None is 0.8 N, and never fewer than ``num_keep``.
        num_keep: Tokens to keep, a count or a share of N; a count above N keeps all.

    Returns:
        Indices, ascending, int64, ``(min(num_keep, N),)``, on the device of ``visual_ND``.

    Raises:
        PlanError: A number is zero, no count and no share, or ``num_keep > num_aligned``.
    """
    return select_visual_tokens_batch(
        visual_ND[None], [text_MD], num_aligned=num_aligned, num_keep=num_keep
    )[0]


def select_visual_tokens_batch(
    visual_BND: torch.Tensor,
    texts: Sequence[torch.Tensor],
    *,
    num_aligned: int | float | None = None,
    num_keep: int | float,
) -> torch.Tensor:
    """Run :func:`select_visual_tokens` for B images of N tokens at once, with a text per image.

    Args:
        visual_BND: Projected features of B images.
        texts: B tensors ``(M, D)``; M may differ.
        num_aligned: Tokens that survive the alignment stage, as for a single image.
        num_keep: Tokens to keep, as for a single image.

    Returns:
        Indices, ascending in every row, int64, ``(B, min(num_keep, N))``.
    """
    batch, num_tokens, _ = visual_BND.shape
    if len(texts) != batch:
        raise IntegrityError(f"{batch} images but {len(texts)} texts")
    aligned, kept = resolve_budget(num_tokens, num_aligned=num_aligned, num_keep=num_keep)
    if kept == num_tokens:
        return torch.arange(num_tokens, device=visual_BND.device).expand(batch, -1)
    allowed_BN = torch.stack(
        [
            _aligned_mask(visual_ND, text_MD, aligned)
            for visual_ND, text_MD in zip(visual_BND, texts, strict=True)
        ]
    )
    return repmax(visual_BND, kept, allowed_BN).sort(dim=1).values


def _aligned_mask(visual_ND: torch.Tensor, text_MD: torch.Tensor, aligned: int) -> torch.Tensor:
    """Mask ``(N,)`` of the tokens that survive the alignment stage."""
    if text_MD.shape[0] == 0 or aligned == visual_ND.shape[0]:
        return torch.ones(visual_ND.shape[0], dtype=torch.bool, device=visual_ND.device)
    mask_N = torch.zeros(visual_ND.shape[0], dtype=torch.bool, device=visual_ND.device)
    return mask_N.index_fill(0, best(alignment_scores(visual_ND, text_MD), aligned), True)


def resolve_budget(
    num_tokens: int, *, num_aligned: int | float | None, num_keep: int | float
) -> tuple[int, int]:
    """Resolve counts and shares of ``num_tokens`` to the counts ``(aligned, kept)``.

    Raises:
        PlanError: A number is zero, no count and no share, or ``num_keep > num_aligned``.
    """
    for name, amount in (("num_keep", num_keep), ("num_aligned", num_aligned)):
        if amount is not None and not (amount >= 1 if isinstance(amount, int) else 0 < amount <= 1):
            raise PlanError(
                f"{name}={amount} is neither a count (an integer of at least 1) nor a share (a "
                "decimal number above 0.0, at most 1.0) of the visual tokens"
            )
    kept = resolve(num_keep, num_tokens)
    if num_aligned is None:
        return max(resolve(DEFAULT_ALIGNED, num_tokens), kept), kept
    aligned = resolve(num_aligned, num_tokens)
    if aligned < kept:
        raise PlanError(
            f"num_aligned={num_aligned} leaves {aligned} of {num_tokens} visual tokens, fewer than "
            f"num_keep={num_keep} ({kept}); raise num_aligned or lower num_keep"
        )
    return aligned, kept


def trimtokenator(
    pool: TokenPool, num_keep: int, num_aligned: int | float | None = None
) -> torch.Tensor:
    """Run :func:`select_visual_tokens` on a pool."""
    return select_visual_tokens(
        pool.visual_ND, pool.text_MD, num_aligned=num_aligned, num_keep=num_keep
    )
