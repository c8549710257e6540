"""Labels of every patch of a scene: the targets that the vision tower is pretrained on.

Shapes: N = patches in reading order, a grid of 24 x 24.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayapp.testbed.vision.questions.words import IDS, NOTHING
from rayapp.testbed.vision.scenes.picture import OUTLINES
from rayapp.testbed.vision.scenes.scenes import PATCH, SIDE, Scene, Thing

GRID = SIDE // PATCH
NUM_PATCHES = GRID * GRID

_SHOWN = 0.3
_HIDDEN = 0.06
_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class PatchLabels:
    """The labels of one scene's patches.

    ``colours_N`` and ``shapes_N`` are ids of words, int64; a patch without a thing has the id of
    ``NOTHING`` in both. ``weights_N`` is 0 if a thing covers so little of a patch that either
    answer would do, else 1. ``geometry_N5`` has, for a patch that shows a thing, the logarithm of
    its size and the way to its middle (right, down), scaled to about -1 to 1. ``middles_N`` is 1 in
    the patch with the middle of a thing.
    """

    colours_N: NDArray[np.int64]
    shapes_N: NDArray[np.int64]
    weights_N: NDArray[np.float32]
    geometry_N5: NDArray[np.float32]
    middles_N: NDArray[np.float32]


def _covered(thing: Thing) -> NDArray[np.float64]:
    """The share of every patch that a thing's outline encloses (a ring's hole too), ``(N,)``."""
    places = (np.arange(SIDE * _SAMPLES // PATCH) + 0.5) * PATCH / _SAMPLES
    u = (places[None, :] - thing.x) / (thing.size / 2)
    v = (places[:, None] - thing.y) / (thing.size / 2)
    outline = OUTLINES["circle" if thing.shape == "ring" else thing.shape]
    inside = outline(u, v) & (np.maximum(abs(u), abs(v)) <= 1)
    return inside.reshape(GRID, _SAMPLES, GRID, _SAMPLES).mean(axis=(1, 3)).reshape(-1)


def _middle(thing: Thing) -> int:
    return int(thing.y // PATCH) * GRID + int(thing.x // PATCH)


def _geometry(thing: Thing, patches_K: NDArray[np.int64]) -> NDArray[np.float32]:
    """Size, way to the middle as seen from patches, and the middle, ``(K, 5)``."""
    right = thing.x - (patches_K % GRID + 0.5) * PATCH
    down = thing.y - (patches_K // GRID + 0.5) * PATCH
    same = [2 * np.log(thing.size / 12.5), 2 * thing.x / SIDE - 1, 2 * thing.y / SIDE - 1]
    size, x, y = (np.full(right.shape, value) for value in same)
    return np.stack([size, right / 8, down / 8, x, y], axis=1).astype(np.float32)


def label_patches(scene: Scene) -> PatchLabels:
    """The labels of a scene's patches."""
    labels = PatchLabels(
        np.full(NUM_PATCHES, IDS[NOTHING], dtype=np.int64),
        np.full(NUM_PATCHES, IDS[NOTHING], dtype=np.int64),
        np.ones(NUM_PATCHES, dtype=np.float32),
        np.zeros((NUM_PATCHES, 5), dtype=np.float32),
        np.zeros(NUM_PATCHES, dtype=np.float32),
    )
    for thing in scene.things:
        covered_N = _covered(thing)
        covered_N[_middle(thing)] = 1.0
        labels.weights_N[(covered_N > _HIDDEN) & (covered_N < _SHOWN)] = 0.0
        shown_K = np.flatnonzero(covered_N >= _SHOWN)
        labels.weights_N[shown_K] = 1.0
        labels.colours_N[shown_K] = IDS[thing.colour]
        labels.shapes_N[shown_K] = IDS[thing.shape]
        labels.geometry_N5[shown_K] = _geometry(thing, shown_K)
        labels.middles_N[_middle(thing)] = 1.0
    return labels
