"""Questions about a scene; every question has one right answer of one word.

Four types name their evidence by a word for it (``colour of the square``); four do not (``colour of
the largest``, ``how many things``), so that what a question's words resemble is not the answer
itself. A scene has a question only if its answer is plain: a named thing occurs once, and a thing
whose place is the answer lies clear of the borders between places.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rayapp.testbed.tasks import below
from rayapp.testbed.vision.scenes.scenes import COLOURS, SHAPES, SIDE, Scene, Thing

NAMING = ("colour-named", "shape-named", "place-named", "count-named")
"""Types whose question names its evidence: a shape, a colour, or both."""

UNNAMED = ("colour-extreme", "shape-extreme", "place-extreme", "count-all")
"""Types whose question does not name its evidence: the largest thing, the smallest thing, all
things."""

TYPES = (*NAMING, *UNNAMED)
"""The types, in the order in which tables list them; a type is the ``task`` of its lines."""

PLACES = (
    ("northwest", "north", "northeast"),
    ("west", "middle", "east"),
    ("southwest", "south", "southeast"),
)
"""Words for the ninths of a scene, from the top, from the left."""

MOST_COUNTED = 3
"""Largest count that is an answer about named things."""

_CLEAR = 3.0


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a scene.

    ``text`` is the question as the prompt has it, ``answer`` is one word, and ``task`` is the type.
    """

    text: str
    answer: str
    task: str


def place_of(thing: Thing) -> str | None:
    """The word for a thing's place; None if its middle is too close to a border."""
    third = SIDE / 3
    for middle in (thing.x, thing.y):
        if min(abs(middle - third), abs(middle - 2 * third)) < _CLEAR:
            return None
    return PLACES[int(thing.y // third)][int(thing.x // third)]


def _named(scene: Scene) -> list[Question]:
    """Questions that name a unique thing, to ask for its colour, its shape or its place."""
    questions = []
    shapes = Counter(thing.shape for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    looks = Counter((thing.colour, thing.shape) for thing in scene.things)
    for thing in scene.things:
        names = []
        if shapes[thing.shape] == 1:
            questions.append(Question(f"colour of the {thing.shape}", thing.colour, "colour-named"))
            names.append(thing.shape)
        if colours[thing.colour] == 1:
            questions.append(Question(f"shape of the {thing.colour}", thing.shape, "shape-named"))
            names.append(thing.colour)
        if looks[thing.colour, thing.shape] == 1:
            names.append(f"{thing.colour} {thing.shape}")
        place = place_of(thing)
        if place is not None:
            questions += [Question(f"where is the {name}", place, "place-named") for name in names]
    return questions


def _counts(scene: Scene) -> list[Question]:
    words = Counter(word for thing in scene.things for word in (thing.shape, thing.colour))
    questions = [
        Question(f"how many {word}", str(words[word]), "count-named")
        for word in (*COLOURS, *SHAPES)
        if words[word] <= MOST_COUNTED
    ]
    return [*questions, Question("how many things", str(len(scene.things)), "count-all")]


def _extremes(scene: Scene) -> list[Question]:
    by_size = sorted(scene.things, key=lambda thing: thing.size)
    questions = []
    for word, thing in (("smallest", by_size[0]), ("largest", by_size[-1])):
        questions.append(Question(f"colour of the {word}", thing.colour, "colour-extreme"))
        questions.append(Question(f"shape of the {word}", thing.shape, "shape-extreme"))
        place = place_of(thing)
        if place is not None:
            questions.append(Question(f"where is the {word}", place, "place-extreme"))
    return questions


def all_questions(scene: Scene) -> list[Question]:
    """Every question that a scene allows."""
    return [*_named(scene), *_counts(scene), *_extremes(scene)]


def _take(
    rng: random.Random, left: list[Question], key: Callable[[Question], str]
) -> list[Question]:
    """Questions drawn class by class; every class (by ``key``) is as likely as the others."""
    classes = sorted({key(question) for question in left})
    chosen = classes[below(rng, len(classes))]
    return [question for question in left if key(question) == chosen]


def draw_questions(rng: random.Random, scene: Scene, count: int) -> list[Question]:
    """Distinct questions about a scene.

    A type is drawn first, all types alike; then, for counts, an answer, so that counting nothing is
    not the rule; then one of these questions.

    Args:
        rng: Source of the draw.
        scene: The scene.
        count: Number of questions wanted.

    Returns:
        ``count`` questions, or all there are where they are fewer.
    """
    left = all_questions(scene)
    drawn: list[Question] = []
    while left and len(drawn) < count:
        pool = _take(rng, left, lambda question: question.task)
        if pool[0].task == "count-named":
            pool = _take(rng, pool, lambda question: question.answer)
        question = pool[below(rng, len(pool))]
        left.remove(question)
        drawn.append(question)
    return drawn


def one_of_each(rng: random.Random, scene: Scene) -> list[Question] | None:
    """One question of every type, in the order of ``TYPES``; None if a type has none."""
    questions = all_questions(scene)
    drawn = []
    for task in TYPES:
        pool = [question for question in questions if question.task == task]
        if not pool:
            return None
        if task == "count-named":
            pool = _take(rng, pool, lambda question: question.answer)
        drawn.append(pool[below(rng, len(pool))])
    return drawn
