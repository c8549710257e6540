"""Choices that ignore the content: random tokens, a uniform grid, and plain down-sampling.

These are strong baselines that papers often leave out ("Token Pruning in Multimodal Large Language
Models: Are We Solving the Right Problem?", arXiv:2502.11501). How a grid is spread is a project
default.
"""

from __future__ import annotations

import math

import torch

from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import even_steps


def at_random(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Tokens drawn without replacement, ascending; an image always gives the same ones."""
    generator = torch.Generator().manual_seed(pool.seed)
    order_N = torch.randperm(pool.num_tokens, generator=generator)
    return order_N[:num_keep].sort().values.to(pool.visual_ND.device)


def uniform_grid(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Tokens on a grid as dense down as across, evenly spread over the image, ascending.

    The grid has exactly K tokens: a row has K // rows tokens, or one more (evenly spread rows get
    the surplus).
    """
    rows, columns = pool.grid
    num_keep = min(num_keep, pool.num_tokens)
    fewest = math.ceil(num_keep / columns)
    num_rows = min(max(round(math.sqrt(num_keep * rows / columns)), fewest, 1), rows, num_keep)
    sizes = torch.full((num_rows,), num_keep // num_rows)
    sizes[even_steps(num_rows, num_keep % num_rows)] += 1
    kept = [
        row * columns + even_steps(columns, int(size))
        for row, size in zip(even_steps(rows, num_rows), sizes, strict=True)
    ]
    return torch.cat(kept).to(pool.visual_ND.device)


def downsampled(pool: TokenPool, num_keep: int) -> torch.Tensor:
    """Every (N / K)-th token in reading order, whatever the image's shape, ascending."""
    kept_K = even_steps(pool.num_tokens, min(num_keep, pool.num_tokens))
    return kept_K.to(pool.visual_ND.device)
