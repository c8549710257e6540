"""Draws the picture of a scene in plain NumPy: the same pixels for the same scene.

Shapes: S = pixels of a side, Y x X = pixels of a window around one thing, C = 3 colours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rayapp.testbed.vision.scenes.scenes import COLOURS, SIDE, Scene, Thing

Pixels = NDArray[np.uint8]
_Floats = NDArray[np.float64]

_PAINTS = {
    "red": (215, 45, 40),
    "green": (45, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (235, 210, 45),
    "purple": (165, 55, 185),
    "cyan": (60, 205, 215),
}
_NUM_STROKES = (5, 10)
_SAMPLES = 4

OUTLINES: dict[str, Callable[[_Floats, _Floats], NDArray[np.bool_]]] = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.9,
    "triangle": lambda u, v: (abs(u) <= (v + 1) / 2) & (v <= 0.9),
    "cross": lambda u, v: np.minimum(abs(u), abs(v)) <= 0.3,
    "ring": lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= 0.3),
}
"""Tests whether a point is inside a shape, in coordinates from -1 to 1 across a thing, down and
right."""


def _coverage(thing: Thing) -> tuple[slice, slice, _Floats]:
    """The window of a thing, and the share of every pixel that the thing covers, ``(Y, X)``."""
    windows, axes = [], []
    for middle in (thing.y, thing.x):
        start = max(0, int(np.floor(middle - thing.size / 2)))
        stop = min(SIDE, int(np.ceil(middle + thing.size / 2)))
        samples = start + (np.arange((stop - start) * _SAMPLES) + 0.5) / _SAMPLES
        windows.append(slice(start, stop))
        axes.append((samples - middle) / (thing.size / 2))
    v, u = axes[0][:, None], axes[1][None, :]
    inside = OUTLINES[thing.shape](u, v) & (abs(u) <= 1) & (abs(v) <= 1)
    rows, columns = inside.shape[0] // _SAMPLES, inside.shape[1] // _SAMPLES
    covered = inside.reshape(rows, _SAMPLES, columns, _SAMPLES).mean(axis=(1, 3))
    return windows[0], windows[1], covered


def _smooth_field(rng: np.random.Generator, cells: int) -> _Floats:
    """Bilinear noise of ``cells`` cells a side, ``(S, S, C)``, about -1 to 1."""
    knots = rng.uniform(-1, 1, (cells + 1, cells + 1, 3))
    places = (np.arange(SIDE) + 0.5) * cells / SIDE
    low = places.astype(int)
    share = (places - low)[:, None, None]
    rows = knots[low] * (1 - share) + knots[low + 1] * share
    share = (places - low)[None, :, None]
    return np.asarray(rows[:, low] * (1 - share) + rows[:, low + 1] * share)


def _stroke(rng: np.random.Generator, canvas: _Floats) -> None:
    """Draw one thin line in a colour of things."""
    paint = np.array(_PAINTS[COLOURS[int(rng.random() * len(COLOURS))]], dtype=float)
    start, angle = rng.uniform(0, SIDE, 2), rng.uniform(0, 2 * np.pi)
    steps = np.arange(rng.uniform(8, 26), step=0.5)
    ys = (start[0] + steps * np.sin(angle)).astype(int)
    xs = (start[1] + steps * np.cos(angle)).astype(int)
    seen = (ys >= 0) & (ys < SIDE) & (xs >= 0) & (xs < SIDE)
    ys, xs = ys[seen], xs[seen]
    canvas[ys, xs] = 0.35 * canvas[ys, xs] + 0.65 * paint


def _backdrop(rng: np.random.Generator) -> _Floats:
    """A backdrop of grey texture at two scales, and strokes."""
    level = rng.uniform(95, 150)
    canvas = level + 28 * _smooth_field(rng, 4) + 18 * _smooth_field(rng, 16)
    least, most = _NUM_STROKES
    for _ in range(least + int(rng.random() * (most - least + 1))):
        _stroke(rng, canvas)
    return canvas


def draw_picture(scene: Scene) -> Pixels:
    """The picture of a scene, ``(S, S, C)``, uint8."""
    rng = np.random.default_rng(scene.backdrop)
    canvas = _backdrop(rng)
    for thing in scene.things:
        rows, columns, covered = _coverage(thing)
        paint = np.array(_PAINTS[thing.colour]) + rng.uniform(-18, 18, 3)
        alpha = covered[:, :, None]
        canvas[rows, columns] = (1 - alpha) * canvas[rows, columns] + alpha * paint
    canvas += rng.uniform(-14, 14, canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8)
