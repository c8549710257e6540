"""The vision recipe: packed rows equal single prompts, losses fall, exports load anywhere."""

from __future__ import annotations

import dataclasses
import io
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.errors import InputError
from rayapp.models.loading import load_model
from rayapp.testbed.vision.attention import attend_packed
from rayapp.testbed.vision.card import Measurement, write_card
from rayapp.testbed.vision.export import export_model, plain_model
from rayapp.testbed.vision.files import prompt_of
from rayapp.testbed.vision.losses import Readings, draw_kept
from rayapp.testbed.vision.model import Shape, new_model
from rayapp.testbed.vision.packing import END_KIND, pack, run_packed
from rayapp.testbed.vision.questions.patches import GRID, NUM_PATCHES
from rayapp.testbed.vision.questions.questions import TYPES, draw_questions
from rayapp.testbed.vision.questions.words import IDS, NOTHING
from rayapp.testbed.vision.recipe import Recipe, Stage
from rayapp.testbed.vision.scenes.picture import draw_picture
from rayapp.testbed.vision.scenes.scenes import COLOURS, PATCH, SHAPES
from rayapp.testbed.vision.score import draw_asked_scenes, score
from rayapp.testbed.vision.tower import (
    cut_windows,
    pixels_of,
    running_counts,
    stack_labels,
    visual_features,
    visual_tokens,
)
from rayapp.testbed.vision.train import (
    load_checkpoint,
    save_checkpoint,
    start_run,
    take_step,
    train,
)
from rayapp.vision.llava import load_image_processor

SHAPE = Shape(
    tower_layers=2,
    tower_hidden=32,
    tower_heads=2,
    tower_mlp=32,
    num_blocks=2,
    hidden=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp=48,
)
RECIPE = Recipe(
    tower=Stage(4, 2, 2, 0.5),
    answers=Stage(4, 2, 2, 0.5),
    lengths=Stage(2, 2, 1, 0.5),
    question_tokens=64,
    shape=SHAPE,
)
ASKED = draw_asked_scenes("validation", 2, 0)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    """A model none of whose weights is zero, so that every path has an effect."""
    drawn = attend_packed(new_model(SHAPE, 0))
    generator = torch.Generator().manual_seed(1)
    for weight in drawn.parameters():
        if weight.ndim == 2 and not weight.any():
            weight.data.normal_(std=0.2, generator=generator)
    return drawn.eval()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vision") / "model"
    export_model(model, SHAPE, directory)
    return directory


def packed_logits(
    model: LlavaForConditionalGeneration, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits ``(B, types, 2, V)`` of all questions of ``ASKED``."""
    packed = pack([each.questions for each in ASKED], 60)
    with torch.no_grad():
        pixels = pixels_of([each.scene for each in ASKED]).to(model.dtype)
        visual = visual_tokens(model, visual_features(model, pixels))
        shown = visual if kept is None else visual.take_along_dim(kept[..., None], dim=1)
        logits = run_packed(model, shown, packed, kept).logits_KV
    return logits.view(len(ASKED), len(TYPES), 2, -1)


def test_packed_rows_equal_single_prompts_in_plain_transformers(model) -> None:
    plain, ours = plain_model(model, SHAPE), packed_logits(model)
    for row, each in enumerate(ASKED):
        for column, question in enumerate(each.questions):
            words = [IDS[word] for word in (*question.text.split(), question.answer)]
            ids = torch.tensor([[IDS["<image>"]] * NUM_PATCHES + words])
            with torch.no_grad():
                theirs = plain(input_ids=ids, pixel_values=pixels_of([each.scene])).logits[0, -2:]
            torch.testing.assert_close(ours[row, column], theirs, atol=2e-5, rtol=1e-5)


def test_a_step_that_shows_few_tokens_equals_the_model_with_the_others_masked_out(model) -> None:
    """All positions stay, so a mask in plain transformers is the oracle."""
    labels = stack_labels([each.scene for each in ASKED])["colours_N"]
    kept = draw_kept(random.Random(3), labels, 300)
    assert kept.shape == (len(ASKED), 300)
    assert (kept.diff(dim=1) > 0).all()
    nothing = IDS[NOTHING]
    shown = labels.take_along_dim(kept, dim=1)
    assert ((shown != nothing).sum(1) == (labels != nothing).sum(1)).all(), "things are all there"
    plain, ours = plain_model(model, SHAPE), packed_logits(model, kept)
    for row, each in enumerate(ASKED):
        words = [IDS[word] for word in (*each.questions[0].text.split(), each.questions[0].answer)]
        ids = torch.tensor([[IDS["<image>"]] * NUM_PATCHES + words])
        mask = torch.zeros_like(ids)
        mask[0, kept[row]] = mask[0, NUM_PATCHES:] = 1
        with torch.no_grad():
            theirs = plain(
                input_ids=ids,
                pixel_values=pixels_of([each.scene]),
                attention_mask=mask,
                position_ids=torch.arange(ids.shape[1])[None],
            ).logits[0, -2:]
        torch.testing.assert_close(ours[row, 0], theirs, atol=2e-5, rtol=1e-5)


def test_a_little_background_is_shown_at_first_and_any_amount_at_last() -> None:
    recipe = dataclasses.replace(RECIPE, answer_tokens=99, least_tokens=72)
    rng = random.Random(0)
    assert {recipe.tokens_at(step, rng) for step in (4, 7)} == {99}
    last = [recipe.tokens_at(8, rng) for _ in range(300)]
    assert 72 <= min(last) < 80
    assert 540 < max(last) <= NUM_PATCHES
    assert 180 < sorted(last)[150] < 230, "even in their logarithm"


def test_running_counts_end_at_what_the_scene_holds() -> None:
    scenes = [each.scene for each in ASKED]
    counts = running_counts(stack_labels(scenes))
    assert (counts.diff(dim=1) >= 0).all()
    for scene, last in zip(scenes, counts[:, -1], strict=True):
        looks = Counter(word for thing in scene.things for word in (thing.colour, thing.shape))
        held = [len(scene.things), *(looks[word] for word in (*COLOURS, *SHAPES))]
        assert last.tolist() == held
        first = min(thing.y for thing in scene.things)
        above = counts[scenes.index(scene), : int(first // PATCH) * GRID]
        assert not above.any(), "nothing is counted before it is seen"


def test_rates_fall_to_zero_and_sooner_with_more_power() -> None:
    line, curve = Stage(100, 1, 10, 0.5), Stage(100, 1, 10, 0.5, 2.0)
    assert Stage(100, 1, 10, 0.5, 2.0, 0.4).rate_at(75) == 0.4 * curve.rate_at(75)
    assert line.rate_at(0) == curve.rate_at(0) == 0.1
    assert line.rate_at(30) == curve.rate_at(30) == 1.0
    assert line.rate_at(75) == 0.5
    assert curve.rate_at(75) == 0.25
    assert line.rate_at(100) == curve.rate_at(100) == 0.0


def test_questions_that_do_not_fit_are_left_out_whole() -> None:
    questions = draw_questions(random.Random(0), ASKED[0].scene, 20)
    packed = pack([questions], 33)
    answers = [kind for kind in packed.kinds_BQ[0].tolist() if 0 < kind < END_KIND]
    assert answers == [1 + TYPES.index(each.task) for each in questions[: len(answers)]]
    assert (packed.kinds_BQ == END_KIND).sum() == len(answers) >= 4
    assert packed.ids_BQ.shape == (1, 33)


def test_the_export_loads_in_plain_transformers(model, exported: Path) -> None:
    loaded = LlavaForConditionalGeneration.from_pretrained(exported).eval()
    expected = plain_model(model, SHAPE).to(torch.bfloat16).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    processor = AutoProcessor.from_pretrained(exported)
    picture = Image.fromarray(draw_picture(ASKED[0].scene))
    message = [{"type": "image"}, {"type": "text", "text": ASKED[0].questions[0].text}]
    chat = processor.apply_chat_template([{"role": "user", "content": message}], tokenize=False)
    inputs = processor(images=picture, text=chat, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], pixels_of([ASKED[0].scene]))
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(IDS["<image>"]) == NUM_PATCHES
    assert ids[NUM_PATCHES:] == [IDS[word] for word in ASKED[0].questions[0].text.split()]


def test_the_export_answers_alike_in_rayapp(model, exported: Path) -> None:
    loaded = load_model(exported, dtype="float32")
    pipeline = LocalPipeline(
        loaded.model, loaded.tokenizer, image_processor=load_image_processor(exported)
    )
    rounded = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    ours = packed_logits(attend_packed(rounded))
    buffer = io.BytesIO()
    Image.fromarray(draw_picture(ASKED[0].scene)).save(buffer, format="PNG")
    for column, question in enumerate(ASKED[0].questions[:3]):
        prompt = ImagePrompt(prompt_of(question.text), [buffer.getvalue()], question.text)
        theirs = pipeline.answer_logits(prompt, (IDS[question.answer], IDS["<|end|>"]))
        torch.testing.assert_close(ours[0, column], theirs.float(), atol=3e-5, rtol=1e-4)


def test_windows_hold_every_patch_once() -> None:
    grid = torch.arange(2 * NUM_PATCHES).view(2, NUM_PATCHES)
    windows = cut_windows(grid, (5, 17))
    assert windows.shape == (8, NUM_PATCHES // 4)
    assert windows[:4].flatten().sort().values.tolist() == list(range(NUM_PATCHES))
    first = windows[0].view(GRID // 2, GRID // 2)
    assert first[0, 0] == 5 * GRID + 17
    assert first[1, 0] - first[0, 0] == GRID
    assert first[0, 7] == 5 * GRID


@pytest.mark.parametrize("word_targets", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_few_steps_lower_both_losses(word_targets: bool) -> None:
    recipe = dataclasses.replace(
        RECIPE,
        tower=Stage(12, 2, 2, 0.1),
        answers=Stage(24, 2, 2, 0.1),
        vector_lr=1e-2,
        word_targets=word_targets,
    )
    run, tower, nats = start_run(recipe), [], []
    words = run.model.model.language_model.embed_tokens.weight.detach().clone()
    # Later steps never read the tower's targets.
    for step in range(recipe.num_steps if word_targets else recipe.tower.num_steps):
        seen = Readings()
        take_step(run, seen)
        means = seen.take()
        (tower if recipe.trains_tower(step) else nats).append(means.get("nats", means.get("loss")))
        if step == recipe.tower.num_steps - 1:
            moved = not torch.equal(run.model.model.language_model.embed_tokens.weight, words)
            assert moved == word_targets
    assert sum(tower[-3:]) < 0.8 * sum(tower[:3])
    if word_targets:
        assert sum(nats[-3:]) < 0.85 * sum(nats[:3])


def test_the_second_stage_leaves_the_tower_alone() -> None:
    run = start_run(RECIPE)
    for _ in range(RECIPE.tower.num_steps):
        take_step(run, Readings())
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    take_step(run, Readings())
    take_step(run, Readings())
    changed = {name for name, w in run.model.named_parameters() if not torch.equal(w, before[name])}
    assert not any(".vision_tower." in name for name in changed)
    assert any(".multi_modal_projector." in name for name in changed)
    assert any(".language_model.layers." in name for name in changed)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    whole = train(start_run(RECIPE), tmp_path / "whole")
    assert whole.step == RECIPE.num_steps
    parted = start_run(RECIPE)
    for stop in (2, 4, 6, 9):  # within every stage, and between two
        while parted.step < stop:
            take_step(parted, Readings())
        save_checkpoint(parted, tmp_path)
        parted = load_checkpoint(tmp_path)
        assert parted.step == stop
    resumed = train(parted, tmp_path)
    for name, weight in whole.model.named_parameters():
        resumed_weight = resumed.model.get_parameter(name)
        torch.testing.assert_close(weight, resumed_weight, atol=2e-3, rtol=2e-3)


def test_score_is_the_share_of_best_tokens(model) -> None:
    ours = packed_logits(model).argmax(-1)
    shares = score(model, ASKED)
    for column, task in enumerate(TYPES):
        wanted = [[IDS[each.questions[column].answer], IDS["<|end|>"]] for each in ASKED]
        right = [ours[row, column].tolist() == want for row, want in enumerate(wanted)]
        assert shares[task] == sum(right) / len(right)
    with pytest.raises(InputError, match="nothing to score"):
        score(model, [])


def test_the_card_says_what_was_measured(exported: Path) -> None:
    run = start_run(RECIPE)
    shares = {task: 0.9 + index / 100 for index, task in enumerate(TYPES)}
    write_card(exported, run, Measurement(shares, 7, 3))
    card = (exported / "README.md").read_text(encoding="utf-8")
    for task, share in shares.items():
        assert f"| {task} | {share:.4f} |" in card
    assert "(seed 3)" in card
    assert "{" not in card


def test_a_recipe_without_steps_is_refused() -> None:
    with pytest.raises(InputError, match="at least one of each"):
        Recipe(tower=Stage(0, 8, 1, 0.5))
