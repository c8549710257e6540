"""Cluttered scenes as plain data; splits are disjoint by the hash of a scene.

A scene holds three to six things of five shapes and six colours on a textured backdrop with thin
strokes in the colours of things. Exactly one thing is the largest and one the smallest, both by a
clear margin, and the patch of every thing's middle is unambiguous too. The hash of the whole scene
decides its split, so no (scene, question) pair of one split appears in another, nor any other
question about that scene.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass

from rayapp.testbed.tasks import below, split_of

SIDE = 96
"""Pixels of a scene's side."""

PATCH = 4
"""Pixels of a patch's side, and so of a visual token's."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")

NUM_THINGS = (3, 6)
"""Least and most things in a scene."""

SIZE_MARGIN = 1.25
"""The largest thing is at least this many times as wide as any other; the smallest is as much
narrower."""

_GAP = 2.0
_OFF_CENTRE = 1.2
_MAX_TRIES = 60


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape of a scene; lengths in pixels.

    Attributes:
        shape: One of ``SHAPES``.
        colour: One of ``COLOURS``.
        size: Side of the square around it.
        x: Its middle, from the left.
        y: Its middle, from the top.
    """

    shape: str
    colour: str
    size: float
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Things that do not overlap, and the seed of the backdrop behind them."""

    things: tuple[Thing, ...]
    backdrop: int

    @property
    def identity(self) -> str:
        """The scene as text; equal for equal scenes only."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def split(self) -> str:
        """The split that owns this scene."""
        return split_of(f"rayapp.testbed.vision/{self.identity}")


def _between(rng: random.Random, low: float, high: float) -> float:
    """A draw with one decimal, so that a scene's text is the same everywhere."""
    return round(low + rng.random() * (high - low), 1)


def _draw_middle(rng: random.Random, edge: float) -> float:
    """A coordinate at least ``edge`` from the sides, not near the border of two patches."""
    while True:
        value = _between(rng, edge, SIDE - edge)
        if abs(value % PATCH - PATCH / 2) <= _OFF_CENTRE:
            return value


def _draw_sizes(rng: random.Random, count: int) -> list[float]:
    """Sizes of a scene's things: the largest first, the smallest last."""
    middle = sorted((_between(rng, 11.0, 14.0) for _ in range(count - 2)), reverse=True)
    smallest = middle[-1] / _between(rng, SIZE_MARGIN + 0.05, 1.45)
    largest = middle[0] * _between(rng, SIZE_MARGIN + 0.05, 1.5)
    return [round(largest, 1), *middle, round(smallest, 1)]


def _draw_place(
    rng: random.Random, size: float, placed: list[tuple[float, float, float]]
) -> tuple[float, float] | None:
    """A free place for a thing, or None after many tries."""
    edge = size / 2 + 1
    for _ in range(_MAX_TRIES):
        x, y = _draw_middle(rng, edge), _draw_middle(rng, edge)
        if all(max(abs(x - a), abs(y - b)) >= (size + other) / 2 + _GAP for a, b, other in placed):
            return x, y
    return None


def _draw_looks(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Shapes and colours of things, from a few of each, so that some repeat and others do not."""
    shapes = sorted(SHAPES, key=lambda _: rng.random())[: 3 + below(rng, 3)]
    colours = sorted(COLOURS, key=lambda _: rng.random())[: 3 + below(rng, 3)]
    return [
        (shapes[below(rng, len(shapes))], colours[below(rng, len(colours))]) for _ in range(count)
    ]


def draw_any_scene(rng: random.Random) -> Scene:
    """Draw a scene of any split."""
    least, most = NUM_THINGS
    while True:
        sizes = _draw_sizes(rng, least + below(rng, most - least + 1))
        placed: list[tuple[float, float, float]] = []
        for size in sizes:
            place = _draw_place(rng, size, placed)
            if place is None:
                break
            placed.append((*place, size))
        else:
            break
    things = [
        Thing(shape, colour, size, x, y)
        for (shape, colour), (x, y, size) in zip(_draw_looks(rng, len(sizes)), placed, strict=True)
    ]
    return Scene(tuple(things), below(rng, 2**31))


def draw_scene(rng: random.Random, split: str) -> Scene:
    """Draw a scene that ``split`` owns."""
    while True:
        scene = draw_any_scene(rng)
        if scene.split == split:
            return scene
