"""Scenes and questions: the same everywhere, answered by looking, apart by split."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayapp.testbed.tasks import SPLITS
from rayapp.testbed.vision.files import write_questions
from rayapp.testbed.vision.questions.patches import GRID, NUM_PATCHES, label_patches
from rayapp.testbed.vision.questions.questions import (
    NAMING,
    PLACES,
    TYPES,
    Question,
    all_questions,
    draw_questions,
)
from rayapp.testbed.vision.questions.words import (
    IDS,
    NOTHING,
    UNKNOWN_ID,
    VOCABULARY,
    word_tokenizer,
)
from rayapp.testbed.vision.scenes.picture import draw_picture
from rayapp.testbed.vision.scenes.scenes import (
    NUM_THINGS,
    PATCH,
    SIDE,
    SIZE_MARGIN,
    Scene,
    Thing,
    draw_any_scene,
    draw_scene,
)
from rayapp.testbed.vision.score import draw_asked_scenes

SCENES = [draw_scene(random.Random(seed), "train") for seed in range(60)]


def answer(scene: Scene, text: str) -> str:
    """Answer a question by looking at every thing, from its words alone."""
    words = text.split()
    if words[:2] == ["how", "many"]:
        (name,) = words[2:]
        return str(sum(name in ("things", t.shape, t.colour) for t in scene.things))
    names = words[3:]
    found = [t for t in scene.things if {*names} <= {t.shape, t.colour}]
    if names == ["largest"]:
        found = [max(scene.things, key=lambda t: t.size)]
    if names == ["smallest"]:
        found = [min(scene.things, key=lambda t: t.size)]
    (thing,) = found
    if words[0] == "where":
        return PLACES[int(thing.y // 32)][int(thing.x // 32)]
    return {"colour": thing.colour, "shape": thing.shape}[words[0]]


def test_every_answer_is_what_looking_gives() -> None:
    asked = [(scene, each) for scene in SCENES for each in all_questions(scene)]
    assert {each.task for _, each in asked} == set(TYPES)
    for scene, each in asked:
        assert answer(scene, each.text) == each.answer, each


def test_at_least_half_of_the_types_do_not_name_their_evidence() -> None:
    looks = {word for scene in SCENES for t in scene.things for word in (t.shape, t.colour)}
    assert len(NAMING) * 2 == len(TYPES)
    for scene in SCENES:
        for each in all_questions(scene):
            assert bool(looks & set(each.text.split())) == (each.task in NAMING), each


def test_scenes_are_as_they_are_described() -> None:
    for scene in SCENES:
        least, most = NUM_THINGS
        assert least <= len(scene.things) <= most
        sizes = sorted(t.size for t in scene.things)
        assert sizes[1] >= SIZE_MARGIN * sizes[0]
        assert sizes[-1] >= SIZE_MARGIN * sizes[-2]
        for index, thing in enumerate(scene.things):
            reach = thing.size / 2
            assert min(thing.x, thing.y) >= reach
            assert max(thing.x, thing.y) <= SIDE - reach
            assert all(0.7 < middle % PATCH < 3.3 for middle in (thing.x, thing.y))
            for other in scene.things[:index]:
                apart = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert apart > reach + other.size / 2


def test_a_seed_gives_the_same_scene_picture_and_questions() -> None:
    one, two = (draw_asked_scenes("test", 2, 5) for _ in range(2))
    assert one == two
    assert draw_asked_scenes("test", 1, 5) == one[:1]
    assert one != draw_asked_scenes("test", 2, 6)
    assert [each.task for each in one[0].questions] == list(TYPES)
    picture = draw_picture(one[0].scene)
    assert picture.shape == (SIDE, SIDE, 3)
    assert np.array_equal(picture, draw_picture(two[0].scene))


def test_splits_share_no_scene() -> None:
    owned = {split: {each.scene for each in draw_asked_scenes(split, 12, 0)} for split in SPLITS}
    for split, scenes in owned.items():
        assert {scene.split for scene in scenes} == {split}
    assert sum(map(len, owned.values())) == len(set().union(*owned.values()))
    shares = [draw_any_scene(random.Random(seed)).split for seed in range(400)]
    assert 0.45 < shares.count("train") / 400 < 0.65


def test_the_hash_depends_on_all_of_a_scene() -> None:
    scene = SCENES[0]
    splits = {Scene(scene.things, seed).split for seed in range(60)}
    assert splits == set(SPLITS)
    thing = scene.things[0]
    moved = Thing(thing.shape, thing.colour, thing.size, thing.x + 0.1, thing.y)
    assert Scene((moved, *scene.things[1:]), scene.backdrop).identity != scene.identity


def test_questions_drawn_are_distinct_and_balanced() -> None:
    drawn = [draw_questions(random.Random(1), scene, 12) for scene in SCENES]
    assert all(len(set(each)) == len(each) == 12 for each in drawn)
    counted = [q.answer for each in drawn for q in each if q.task == "count-named"]
    assert 0.1 < counted.count("0") / len(counted) < 0.5
    assert len(draw_questions(random.Random(1), SCENES[0], 1000)) == len(all_questions(SCENES[0]))


def test_things_show_where_the_labels_say() -> None:
    alone = Thing("square", "red", 16.0, 40.0, 60.0)
    picture = draw_picture(Scene((alone,), 3)).astype(int)
    labels = label_patches(Scene((alone,), 3))
    redness_N = (
        (picture[..., 0] - picture[..., 1:].max(axis=-1))
        .reshape(GRID, PATCH, GRID, PATCH)
        .mean(axis=(1, 3))
        .reshape(-1)
    )
    shown_N = labels.colours_N == IDS["red"]
    assert (shown_N == (labels.shapes_N == IDS["square"])).all()
    assert redness_N[shown_N].min() > 40
    assert np.median(redness_N[labels.colours_N == IDS[NOTHING]]) < 40
    (middle,) = np.flatnonzero(labels.middles_N)
    assert divmod(int(middle), GRID) == (15, 10)
    places = np.flatnonzero(shown_N)
    to_x = (places % GRID + 0.5) * PATCH + 8 * labels.geometry_N5[places, 1]
    to_y = (places // GRID + 0.5) * PATCH + 8 * labels.geometry_N5[places, 2]
    np.testing.assert_allclose(to_x, 40, atol=1e-3)
    np.testing.assert_allclose(to_y, 60, atol=1e-3)
    assert len(labels.colours_N) == NUM_PATCHES


@pytest.mark.parametrize("sample", range(3))
def test_every_thing_has_patches(sample: int) -> None:
    scene = SCENES[sample]
    labels = label_patches(scene)
    assert labels.middles_N.sum() == len(scene.things)
    middles = np.flatnonzero(labels.middles_N)
    seen = {(int(labels.colours_N[m]), int(labels.shapes_N[m])) for m in middles}
    assert seen == {(IDS[t.colour], IDS[t.shape]) for t in scene.things}


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = word_tokenizer(1024)
    assert len(VOCABULARY) < 100
    for scene in SCENES[:10]:
        for each in all_questions(scene):
            ids = tokenizer(f"<image>\n{each.text}")["input_ids"]
            assert ids == [IDS["<image>"], *(IDS[word] for word in each.text.split())]
            assert tokenizer(each.answer)["input_ids"] == [IDS[each.answer]]
            assert tokenizer.decode([IDS[each.answer]]) == each.answer
    assert tokenizer("colour of the red?") == tokenizer("colour of the red")
    assert tokenizer("aubergine")["input_ids"] == [UNKNOWN_ID]


def test_files_hold_prompts_and_pictures(tmp_path: Path) -> None:
    asked = draw_asked_scenes("validation", 2, 0)
    write_questions(tmp_path / "made" / "validation.jsonl", asked)
    raw = (tmp_path / "made" / "validation.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in raw.splitlines()]
    assert len(lines) == 2 * len(TYPES)
    assert {line["image"] for line in lines[: len(TYPES)]} == {lines[0]["image"]}
    for line, each in zip(lines, [q for a in asked for q in a.questions], strict=True):
        assert (
            Question(line["prompt"].removeprefix("<image>\n"), line["completion"], line["task"])
            == each
        )
    picture = np.asarray(Image.open(tmp_path / "made" / lines[0]["image"]))
    assert np.array_equal(picture, draw_picture(asked[0].scene))
