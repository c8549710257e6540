"""The layout of one image's tokens in the prompt: pools that are pruned, and newline tokens.

LLaVA-1.5 gives one pool, a grid in reading order. LLaVA-NeXT gives two: the base view, then the
merged grid of its tiles, in which every row ends with a newline token. Newlines are neither scored
nor budgeted: a newline is kept exactly if its row keeps a token.
Shapes: N = all tokens of the image, newlines included; K = tokens kept; P = tiles, R x S = the
merged grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# The modelling code of LLaVA-NeXT takes most of a second to import, and every process of a service
# imports this module. So that code is imported only when an image of such a model is laid out.


@dataclass(frozen=True)
class PoolLayout:
    """A grid of tokens that begins at ``start`` in the image's tokens."""

    start: int
    rows: int
    columns: int
    has_newlines: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens that can be scored."""
        return self.rows * self.columns

    @property
    def row_length(self) -> int:
        """Number of tokens per row, its newline included."""
        return self.columns + self.has_newlines

    @property
    def stop(self) -> int:
        """Index in the image's tokens at which the next pool begins."""
        return self.start + self.rows * self.row_length

    def places(self, chosen_K: torch.Tensor) -> torch.Tensor:
        """Places of chosen grid tokens in the image's tokens, then of the newlines they keep."""
        rows_K = chosen_K // self.columns
        tokens_K = self.start + rows_K * self.row_length + chosen_K % self.columns
        if not self.has_newlines:
            return tokens_K
        newlines = self.start + rows_K.unique() * self.row_length + self.columns
        return torch.cat([tokens_K, newlines])

    def tokens(self, features_N: torch.Tensor) -> torch.Tensor:
        """Select the rows of grid tokens from per-token values ``(N, ...)``, without newlines."""
        mine = features_N[self.start : self.stop]
        by_row = mine.unflatten(0, (self.rows, self.row_length))[:, : self.columns]
        return by_row.flatten(0, 1)


@dataclass(frozen=True)
class ImageLayout:
    """The layout of one image: its pools, one after the other."""

    pools: tuple[PoolLayout, ...]

    @property
    def num_tokens(self) -> int:
        """Number of all tokens of the image in the prompt, newlines included."""
        return self.pools[-1].stop

    @property
    def num_visual(self) -> int:
        """Number of tokens that can be scored: all but newlines."""
        return sum(pool.num_tokens for pool in self.pools)

    def keep(self, chosen: Sequence[torch.Tensor]) -> torch.Tensor:
        """Kept places ``(K,)``, ascending, from the grid indices chosen in every pool."""
        places = [pool.places(kept) for pool, kept in zip(self.pools, chosen, strict=True)]
        return torch.cat(places).sort().values


def image_layout(config: Any, size: tuple[int, int]) -> ImageLayout:
    """The layout of an image of ``(height, width)`` pixels in a model of this configuration."""
    patches = config.vision_config.image_size // config.vision_config.patch_size
    base = PoolLayout(0, patches, patches)
    if config.model_type != "llava_next":
        return ImageLayout((base,))
    down, across = _grid(config, size)
    rows, columns = merged_grid(config, torch.empty(down * across, base.num_tokens), size).shape
    return ImageLayout((base, PoolLayout(base.num_tokens, rows, columns, has_newlines=True)))


def num_views(config: Any, size: tuple[int, int]) -> int:
    """Number of views of an image of ``(height, width)`` pixels: the base view and its tiles."""
    if config.model_type != "llava_next":
        return 1
    down, across = _grid(config, size)
    return 1 + down * across


def merged_grid(config: Any, tiles_PN: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """One value per token of every tile, as LLaVA-NeXT's grid without its padding, ``(R, S)``."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    patches = config.vision_config.image_size // config.vision_config.patch_size
    down, across = _grid(config, size)
    grid = tiles_PN.view(down, across, patches, patches).transpose(1, 2)
    return unpad_image(grid.reshape(1, down * patches, across * patches), size)[0]


def _grid(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Numbers of tiles down and across."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    side = config.vision_config.image_size
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    return int(down), int(across)
