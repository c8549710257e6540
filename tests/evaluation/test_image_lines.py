"""Completions about images: read, judged against the plain model, and refused by name."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.engine.local import LocalPipeline
from rayapp.errors import DataError, PlanError
from rayapp.evaluation.data import read_data
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.measures.answers import judge_answers
from rayapp.evaluation.pieces import compute
from rayapp.evaluation.result import EvaluationResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.table import markdown
from rayapp.models.loading import load_model, read_signature
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import KVTransfer, PruningPlan, VisualTokens
from rayapp.vision.inputs import ImageIntake
from rayapp.vision.llava import load_image_processor

QUALITY = EvaluationSettings(num_runs=0, num_resamples=200, split="test")
PLACE = 290
ENTRY = 2 * 2 * 8 * 4  # K and V, heads, head dimension, float32
BLOCKS = 3

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_llava_path) -> Path:
    return tiny_llava_path(tmp_path_factory.mktemp("model"), "llava")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoded_image) -> Path:
    """A folder of images, one of them broken."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for seed in range(3):
        (folder / "images" / f"{seed}.png").write_bytes(encoded_image(seed, 16 + 4 * seed))
    (folder / "broken.png").write_bytes(encoded_image(0)[:100])
    (folder / "notes.txt").write_text("no image")
    return folder


def question(number: int, task: str = "see", **fields: Any) -> dict[str, Any]:
    words = "".join(random.Random(number).choices("abcdefgh", k=5 + number % 2))
    image = {"image": f"images/{number % 3}.png"} if "images" not in fields else {}
    return {"prompt": words, "completion": "xy"[: 1 + number % 2], "task": task, **image, **fields}


@pytest.fixture
def write(folder: Path, tmp_path: Path) -> Write:
    """A function ``write(lines)`` that writes a data file beside the images."""

    def written(*lines: dict[str, Any]) -> Path:
        path = folder / f"{tmp_path.name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return written


def read(home: Path, path: Path) -> list[TokenizedImageLine]:
    intake = ImageIntake.of(load_model(home).model.config)
    found = read_data(
        [path], load_tokenizer(home), max_positions=512, settings=QUALITY, images=intake
    )
    return found.image_lines


def plain_inputs(home: Path, line: TokenizedImageLine) -> dict[str, torch.Tensor]:
    """The inputs that a caller gives the plain model."""
    pixels = [Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in line.images]
    return dict(load_image_processor(home)(images=pixels, return_tensors="pt"))


def plain_nll(home: Path, line: TokenizedImageLine, kept: torch.Tensor | None = None) -> float:
    """NLL by the plain model's own forward, optionally with other visual tokens masked out."""
    model = load_model(home).model
    ids = torch.tensor([[*line.prompt, *line.continuation]])
    mask = torch.ones_like(ids)
    if kept is not None:
        mask[0, : len(line.prompt)] = 0
        mask[0, kept] = 1
    with torch.inference_mode():
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.arange(ids.shape[1])[None],
            **plain_inputs(home, line),
        ).logits[0, len(line.prompt) - 1 : -1]
    chosen = logits.double().log_softmax(-1)[range(len(line.continuation)), line.continuation]
    return -float(chosen.sum())


def test_lines_are_tokenised_as_a_pipeline_does_it(home, write) -> None:
    several = question(2, images=["images/0.png", "images/1.png"])
    placed = question(1) | {"prompt": "look: <image> and say"}
    one, two, three = read(home, write(question(0), several, placed))
    assert len(one.prompt) == one.prompt.count(PLACE) + len(one.asked) - 1
    assert (one.prompt.count(PLACE), one.asked.count(PLACE)) == (16, 1)
    assert (two.prompt.count(PLACE), two.asked.count(PLACE), len(two.images)) == (32, 2, 2)
    assert one.asked[:2] == (PLACE, ord("\n"))
    assert bytes(one.words).decode() == question(0)["prompt"]
    assert bytes(three.words).decode() == "look:  and say"
    assert three.asked.index(PLACE) == 6
    assert one.continuation[-1] == 256


def test_the_dense_side_is_the_plain_model(home, write) -> None:
    path = write(*(question(n, images=["images/0.png", "images/2.png"]) for n in range(3)))
    result = evaluate(home, None, [path], settings=QUALITY)
    lines = read(home, path)
    expected = sum(plain_nll(home, line) for line in lines)
    row = result.tasks[0]
    assert row.dense_nll == pytest.approx(expected / row.num_tokens, abs=1e-5)
    assert row.plan_nll == row.dense_nll
    assert abs(row.kl.upper) < 1e-9
    assert (row.min_prompt_tokens, row.max_prompt_tokens) == (32 + 2 + 5, 32 + 2 + 6)
    assert row.bytes_full == sum(len(line.prompt) for line in lines) * ENTRY * BLOCKS
    assert row.saved_by_visual_tokens_bytes == 0
    assert "visual" not in markdown(result)


@pytest.mark.slow
def test_a_plan_prunes_visual_tokens_and_says_what_that_saved(home, write) -> None:
    path = write(*(question(n, task=f"t{n % 2}") for n in range(4)))
    plan = PruningPlan(
        model=read_signature(home),
        visual_tokens=VisualTokens(num_keep=5),
        kv_transfer={0: KVTransfer(first=2, last=6)},
    )
    cut_nothing = plan.model_copy(update={"kv_transfer": {}})
    result = evaluate(home, cut_nothing, [path], settings=QUALITY)
    pipe = LocalPipeline(
        load_model(home).model, plan=cut_nothing, image_processor=load_image_processor(home)
    )
    expected: dict[str, list[float]] = {"t0": [], "t1": []}
    for line in read(home, path):
        taken = pipe.images.intake.take_all(line.images)
        ran = pipe.images.embed(line.asked, taken, plan.visual_tokens, line.words)
        nll = plain_nll(home, line, ran.positions_T)
        expected[line.task].append(nll)
        assert nll != pytest.approx(plain_nll(home, line), abs=1e-3)
    for row in result.tasks:
        assert row.plan_nll * row.num_tokens == pytest.approx(sum(expected[row.task]), abs=1e-4)
        assert row.kl.mean > 1e-3
        assert row.saved_by_visual_tokens_bytes == row.num_examples * 11 * ENTRY * BLOCKS
        saved = row.saved_by_visual_tokens_bytes
        assert row.bytes_full == row.bytes_sent - row.overhead_bytes + saved
    cut = evaluate(home, plan, [path], settings=QUALITY).mean
    assert cut.saved_by_visual_tokens_bytes == result.mean.saved_by_visual_tokens_bytes
    assert cut.bytes_sent < result.mean.bytes_sent
    table = markdown(result)
    assert "saved by visual pruning" in table
    assert f"| {11 * ENTRY * BLOCKS:,} |" in table


def test_exact_match_is_what_plain_generate_answers(home, write) -> None:
    model = load_model(home).model
    lines = read(home, write(*(question(n) for n in range(3))))
    pipe = LocalPipeline(model, image_processor=load_image_processor(home))
    for line in lines:
        asked = torch.tensor([line.prompt])
        found = load_model(home).model.generate(
            input_ids=asked, **plain_inputs(home, line), max_new_tokens=4, do_sample=False
        )
        right = tuple(found[0, len(line.prompt) :].tolist())
        wrong = (*right[:2], (right[2] + 1) % 250, right[3])
        told = [replace(line, continuation=answer) for answer in (right, wrong)]
        assert [answer.is_match for answer in judge_answers(pipe, told)] == [True, False]


@pytest.mark.slow
def test_text_beside_images_counts_as_it_does_alone(home, write, tmp_path) -> None:
    texts = [{"prompt": "abcabc" * (1 + n), "completion": "z", "task": "t"} for n in range(3)]
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(json.dumps(line) + "\n" for line in texts))
    mixed = write(texts[0], question(0), *texts[1:], question(1, task="t"))
    plan = PruningPlan(
        model=read_signature(home), visual_tokens=VisualTokens(num_keep=3, method="random")
    )
    only = evaluate(home, plan, [alone], settings=QUALITY)
    both = evaluate(home, plan, [mixed], settings=QUALITY)
    assert [(row.task, row.num_examples) for row in both.tasks] == [("see", 1), ("t", 4)]
    assert only.mean.kl.mean == 0.0
    assert only.mean.saved_by_visual_tokens_bytes == 0
    assert both.tasks[1].saved_by_visual_tokens_bytes == 13 * ENTRY * BLOCKS
    limited = evaluate(home, plan, [mixed], settings=QUALITY.model_copy(update={"limit": 3}))
    assert limited.tasks[1].dense_nll == only.mean.dense_nll


@pytest.mark.slow
def test_timed_prompts_hold_an_image_that_is_encoded_every_time(home, write, monkeypatch) -> None:
    loaded = load_model(home)
    monkeypatch.setattr(compute, "load_model", lambda *_, **__: loaded)
    towers: list[int] = []
    loaded.model.model.vision_tower.register_forward_hook(lambda *_: towers.append(1))
    settings = QUALITY.model_copy(
        update={"num_runs": 1, "batch_sizes": (2,), "num_prompt_tokens": 8, "num_answer_tokens": 3}
    )
    plan = PruningPlan(model=loaded.signature, visual_tokens=VisualTokens(num_keep=3))
    (timing,) = evaluate(home, plan, [write(question(0))], settings=settings).latency
    assert (timing.num_prompt_tokens, timing.num_image_tokens) == (24, 16)
    quality, sides, runs, prompts = 1, 2, 2, 2  # one run to warm up
    assert len(towers) == quality + sides * runs * prompts


def test_timed_prompts_of_text_ignore_a_rule_for_images(home, write) -> None:
    settings = QUALITY.model_copy(
        update={"num_runs": 1, "batch_sizes": (1,), "num_prompt_tokens": 8, "num_answer_tokens": 3}
    )
    plan = PruningPlan(model=read_signature(home), visual_tokens=VisualTokens(num_keep=3))
    path = write({"prompt": "abc", "completion": "d"})
    (timing,) = evaluate(home, plan, [path], settings=settings).latency
    assert (timing.num_prompt_tokens, timing.num_image_tokens) == (8, 0)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "image": "gone.png"}, "image 'gone.png' is no file; give a path relative"),
        ({**GOOD, "image": "images"}, "image 'images' is no file"),
        ({**GOOD, "image": "a\0b"}, "is no file"),
        ({**GOOD, "image": "n" * 5_000}, "File name too long"),
        ({**GOOD, "images": ["images/0.png", "broken.png"]}, "'broken.png': the PNG image cannot"),
        ({**GOOD, "image": "notes.txt"}, "no PNG, JPEG or WebP"),
        ({**GOOD, "images": []}, "`images`: "),
        ({**GOOD, "image": ""}, "`image` is empty"),
        ({**GOOD, "image": 3}, "`image` is not a string"),
        ({**GOOD, "images": "images/0.png"}, "`images`"),
        ({**GOOD, "image": "images/0.png", "images": ["images/0.png"]}, "both `image` and `images"),
        ({**GOOD, "images": ["images/0.png"] * 9}, "9 images, but at most 8"),
        ({**GOOD, "prompt": "<image><image>", "image": "images/0.png"}, "2 image placeholders but"),
        ({"prompt": "a", "image": "images/0.png"}, "`completion` is missing"),
        ({**GOOD, "image": "images/0.png", "text": "t"}, "only completions may have images"),
        (
            {"prompt": "a", "choices": ["b", "c"], "answer": 0, "image": "images/0.png"},
            "has an image and `answer`, but only completions",
        ),
        (
            {**GOOD, "prompt": "a" * 500, "image": "images/0.png"},
            "517 prompt tokens, 16 of them of images",
        ),
    ],
)
def test_bad_lines_are_named_before_anything_runs(home, write, monkeypatch, line, message) -> None:
    monkeypatch.setattr(compute, "load_model", None)
    path = write(question(0), line)
    with pytest.raises(DataError) as refused:
        evaluate(home, None, [path], settings=QUALITY)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{path} line 2: ")


def test_text_models_and_unfit_plans_are_refused(home, write, save_tiny, tmp_path) -> None:
    path = write(GOOD, question(0))
    with pytest.raises(DataError, match="line 2: has an image, and this model reads text only"):
        evaluate(save_tiny(tmp_path, "llama"), None, [path], settings=QUALITY)
    signature = read_signature(home)
    last = write(question(0) | {"prompt": "what is <image>"})
    by_decode = PruningPlan(model=signature, first_token="decode")
    with pytest.raises(DataError, match="line 1: the prompt ends with an image"):
        evaluate(home, by_decode, [last], settings=QUALITY)
    rule = VisualTokens(method="psychic", num_keep=3)
    plan = PruningPlan(model=signature, visual_tokens=rule)
    with pytest.raises(PlanError, match="'psychic' is not known"):
        evaluate(home, plan, [path], settings=QUALITY)


@pytest.mark.slow
def test_every_stage_of_a_first_token_by_decode(home, write) -> None:
    rule = VisualTokens(num_keep=4, positions="compact")
    signature = read_signature(home)
    path = write(*(question(n) for n in range(2)))
    rows = [
        evaluate(
            home,
            PruningPlan(model=signature, visual_tokens=rule, first_token=stage),
            [path],
            settings=QUALITY,
        ).mean
        for stage in ("prefill", "decode")
    ]
    assert rows[0].plan_nll == pytest.approx(rows[1].plan_nll, abs=1e-4)
    assert rows[0].saved_by_visual_tokens_bytes == rows[1].saved_by_visual_tokens_bytes


@pytest.mark.slow
def test_the_job_evaluates_lines_about_images(home, write, tmp_path, run_job_here) -> None:
    plan = PruningPlan(model=read_signature(home), visual_tokens=VisualTokens(num_keep=3))
    plan.save(tmp_path / "plan")
    common = ["--model", str(home), "--plan", str(tmp_path / "plan"), "--runs", "0"]
    data = ["--data", str(write(question(0), question(1)))]
    out = tmp_path / "result.json"
    done = run_job_here("evaluate", *common, *data, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "saved by visual pruning" in done.stdout
    assert EvaluationResult.load(out).complete
