"""Pictures of the visual tokens that a method keeps: a photo per grid, and a mask to lay over it.

Shapes: C = 3 colours, Y x X = pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from rayapp.evaluation.visual.result import View
from rayapp.vision.layout import ImageLayout, PoolLayout

CELL = 8
"""Pixels of a token's side in a mask."""
MAX_SIDE = 336
"""Most pixels of a photo's longer side."""
_CLEAR, _DROPPED, _FRAME = range(3)
_PALETTE = (0, 0, 0, 16, 20, 26, 255, 255, 255)
_ALPHA = bytes([0, 168, 255])


def views(
    processor: Any,
    image: Image.Image,
    layout: ImageLayout,
    kept: Mapping[str, torch.Tensor],
) -> tuple[View, ...]:
    """Views of an image: every grid over its photo, with the tokens that each method keeps.

    Args:
        processor: The model's image processor: the first grid lies over the picture that it makes
            for the tower.
        image: The decoded image; further grids (LLaVA-NeXT's tiles) lie over all of it.
        layout: The layout of the image's tokens.
        kept: Places among the image's tokens, by method.
    """
    grids = []
    for number, pool in enumerate(layout.pools):
        photo = image if number else _as_seen(processor, image)
        tokens = {method: _tokens(pool, places) for method, places in kept.items()}
        encoded = base64.b64encode(_photo(photo))
        grids.append(View(photo=encoded, rows=pool.rows, columns=pool.columns, kept=tokens))
    return tuple(grids)


def _as_seen(processor: Any, image: Image.Image) -> Image.Image:
    """The picture that the tower gets from the processor (its first view), scaled and padded."""
    plain = {"do_rescale": False, "do_normalize": False}
    pixels = processor(images=[image], return_tensors="pt", **plain)["pixel_values"]
    first_CYX = pixels.reshape(-1, *pixels.shape[-3:])[0]
    return Image.fromarray(first_CYX.to(torch.uint8).permute(1, 2, 0).numpy())


def _photo(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return _png(small)


def _png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, **options)
    return buffer.getvalue()


def _tokens(pool: PoolLayout, places: torch.Tensor) -> tuple[int, ...]:
    """Indices in a grid of the places that lie in it; newlines are no tokens of a grid."""
    inside = [int(place) - pool.start for place in places if pool.start <= place < pool.stop]
    rows = [divmod(place, pool.row_length) for place in inside]
    return tuple(row * pool.columns + column for row, column in rows if column < pool.columns)


def mask(rows: int, columns: int, kept: Sequence[int]) -> bytes:
    """A PNG to lay over a grid: kept tokens clear in a white frame, all others darkened.

    A token has ``CELL`` pixels a side, so the mask looks alike over any photo, on light pages and
    dark ones.
    """
    picture = Image.new("P", (columns * CELL, rows * CELL), _DROPPED)
    picture.putpalette(_PALETTE)
    for token in kept:
        row, column = divmod(token, columns)
        left, top = column * CELL, row * CELL
        picture.paste(_FRAME, (left, top, left + CELL, top + CELL))
        picture.paste(_CLEAR, (left + 1, top + 1, left + CELL - 1, top + CELL - 1))
    return _png(picture, transparency=_ALPHA)
