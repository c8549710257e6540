"""A pool of visual tokens that compete for one budget, the input of every method.

Shapes: N = tokens of the pool, M = text tokens, D = hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rayapp.errors import IntegrityError


@dataclass(frozen=True)
class TokenPool:
    """The tokens of one view of one image, in reading order, with the data that methods rank by.

    Args:
        visual_ND: Projected features, as the language model gets them.
        text_MD: Embeddings of the user's words; M may be 0.
        grid: Rows and columns that the tokens come from; their product is N.
        seed: Seed of random choices, which depends only on the image's content.
        cls_attention_N: Attention of the vision tower's CLS token to every token, or None.
        text_attention_N: Attention of the prompt's last token to every token inside the language
            model, or None.

    Raises:
        IntegrityError: Shapes do not belong together.
    """

    visual_ND: torch.Tensor
    text_MD: torch.Tensor
    grid: tuple[int, int]
    seed: int = 0
    cls_attention_N: torch.Tensor | None = None
    text_attention_N: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows * columns != self.num_tokens:
            raise IntegrityError(
                f"a grid of {rows} x {columns} does not hold {self.num_tokens} visual tokens"
            )
        for name in ("cls_attention_N", "text_attention_N"):
            scores = getattr(self, name)
            if scores is not None and scores.shape != (self.num_tokens,):
                raise IntegrityError(
                    f"{name} has shape {tuple(scores.shape)}, expected ({self.num_tokens},)"
                )

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the pool, N."""
        return int(self.visual_ND.shape[0])


Selector = Callable[[TokenPool, int], torch.Tensor]
