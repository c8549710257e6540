"""Searches on lines about images: scored as they are served, with and without visual pruning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rayapp.cli import app
from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import DataError, InputError, IntegrityError, PlanError
from rayapp.models.likelihood import kl
from rayapp.models.loading import LoadedModel, load_model
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import KVTransfer, PruningPlan, VisualTokens
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.evaluator.calibration import Calibration, cut, load_calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import naive_scores
from rayapp.pruning.evaluator.visual_words import ImageWordReader, VisualWords, teach
from rayapp.pruning.kv_choice.bytes import KVBytes
from rayapp.pruning.measures.gate_hessian import GatedModel
from rayapp.pruning.preparation import open_evaluator, open_healer, prepare
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective
from rayapp.vision.llava import load_image_processor
from tests.told import Told

CANDIDATES = [DENSE, Candidate((4, 5), (2, 3)), Candidate((), (0, 5))]
RULES = {0: KVTransfer(first=2, last=0.5), 1: KVTransfer(encoding="int8")}
SEARCHES = {
    "all": None,
    "original": VisualTokens(method="divprune", num_keep=3),
    "compact": VisualTokens(num_keep=0.4, positions="compact"),
    "by words": VisualTokens(method="alignment", num_keep=2),
    "fastv": VisualTokens(method="fastv", num_keep=4),
}


@pytest.fixture(scope="module")
def homes(tmp_path_factory, tiny_llava_path) -> dict[str, Path]:
    kinds = ("llava", "llava_next")
    return {kind: tiny_llava_path(tmp_path_factory.mktemp("model"), kind) for kind in kinds}


@pytest.fixture(scope="module")
def home(homes) -> Path:
    return homes["llava"]


def lines_of(folder: Path, encoded_image: Callable[..., bytes], count: int = 6) -> Path:
    """Questions about one or two of three images, and one about none."""
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(encoded_image(seed, 16 + 4 * seed))
    lines = [
        {
            "prompt": f"what {'of ' * (n % 2)}thing {n}",
            "completion": "xyz"[: 1 + n % 3],
            "task": "see" if n % 2 else "look",
            "images": [f"{n % 3}.png", f"{(n + 1) % 3}.png"][: 1 + (n == 4)],
        }
        for n in range(count)
    ]
    path = folder / "lines.jsonl"
    lines.append({"prompt": "no image here", "completion": "yes", "task": "look"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory, encoded_image) -> Path:
    return lines_of(tmp_path_factory.mktemp("data"), encoded_image)


def read(
    home: Path, path: Path, rule: VisualTokens | None, first_token: str = "prefill"
) -> tuple[LoadedModel, Calibration]:
    """A model that knows the images of its calibration lines, and these lines."""
    tokenizer = load_tokenizer(home)
    images = ImageWordReader(
        home, tokenizer, rule, dtype="float32", ends_in_text=first_token == "decode"
    )
    calibration = load_calibration(path, tokenizer, chunk_tokens=200, images=images)
    loaded = load_model(home, dtype="float32")
    teach(loaded.model, calibration.words)
    return loaded, calibration


@cache
def untaught(home: Path) -> LoadedModel:
    """A model that knows no image of calibration lines; it serves, and nobody changes it."""
    return load_model(home, dtype="float32")


def serving(
    home: Path, path: Path, plan: PruningPlan
) -> tuple[LocalPipeline, list[tuple[str | ImagePrompt, str]]]:
    """A pipeline that serves a plan, with every line as a request and its answer."""
    loaded = untaught(home)
    pipeline = LocalPipeline(
        loaded.model, loaded.tokenizer, plan, image_processor=load_image_processor(home)
    )
    asked: list[tuple[str | ImagePrompt, str]] = []
    for text in path.read_text().splitlines():
        line = json.loads(text)
        words, images = line["prompt"], [path.parent / each for each in line.get("images", ())]
        prompt = f"{pipeline.placeholder}\n" * len(images) + words
        asked.append((ImagePrompt(prompt, images, words) if images else words, line["completion"]))
    return pipeline, asked


def served(home: Path, path: Path, plan: PruningPlan) -> list[torch.Tensor]:
    """Logits of every line's answer through the serving path."""
    pipeline, asked = serving(home, path, plan)
    tokenizer = load_tokenizer(home)
    found = []
    for prompt, completion in asked:
        answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
        given = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        found.append(pipeline.answer_logits(given, [*answer, tokenizer.eos_token_id]))
    return found


@pytest.mark.parametrize(
    ("kind", "name", "first_token"),
    [
        pytest.param("llava", "all", "prefill", marks=pytest.mark.slow),
        ("llava", "all", "decode"),
        pytest.param("llava", "original", "prefill", marks=pytest.mark.slow),
        pytest.param("llava", "compact", "decode", marks=pytest.mark.slow),
        pytest.param("llava", "by words", "prefill", marks=pytest.mark.slow),
        ("llava", "fastv", "prefill"),
        ("llava_next", "original", "decode"),
        pytest.param("llava_next", "compact", "prefill", marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_what_is_served(homes, path, kind, name, first_token):
    home, rule = homes[kind], SEARCHES[name]
    loaded, calibration = read(home, path, rule, first_token)
    objective = Objective(first_token=first_token, kv_transfer=RULES)
    compute = LocalCompute(Evaluator(loaded.model, calibration, objective))
    found = Scorer(calibration, objective, compute, weights="w").score_many(CANDIDATES)
    naive = naive_scores(loaded.model, calibration, objective, CANDIDATES)
    shared = {"first_token": first_token, "visual_tokens": rule}
    dense = served(home, path, DENSE.plan(loaded.signature, **shared))
    for candidate, score, want in zip(CANDIDATES, found, naive, strict=True):
        assert score.value == pytest.approx(want.value, rel=1e-4, abs=1e-7)
        plan = candidate.plan(loaded.signature, kv_transfer=RULES, **shared)
        rows = zip(dense, served(home, path, plan), calibration.lines, strict=True)
        kls: dict[str, list[float]] = {}
        for dense_CV, plan_CV, line in rows:
            assert len(dense_CV) == len(line.continuation)
            kls.setdefault(line.task, []).extend(kl(dense_CV, plan_CV).tolist())
        tasks = {task: sum(values) / len(values) for task, values in kls.items()}
        assert score.tasks == pytest.approx(tasks, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    "name", [pytest.param("all", marks=pytest.mark.slow), "original", "compact"]
)
def test_bytes_are_those_of_the_ledger(home, path, name):
    rule = SEARCHES[name]
    loaded, calibration = read(home, path, rule)
    plan = Candidate((), (2, 3)).plan(loaded.signature, kv_transfer=RULES, visual_tokens=rule)
    weighed = KVBytes(loaded.model.config, plan, [line.run_prompt for line in calibration.lines])
    pipeline, asked = serving(home, path, plan)
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    done = pipeline.generate([prompt for prompt, _ in asked], sampling)
    records = [each.transfer for each in done]
    assert sum(r.bytes_full for r in records) == weighed.full
    # A request's own name is shorter than the service's: headers may be 64 bytes apart.
    assert abs(sum(r.bytes_sent for r in records) - weighed.sent(RULES)) <= 64 * len(records)


def test_images_shared_by_lines_are_encoded_once(home, path):
    _, whole = read(home, path, None)
    assert whole.words is not None
    distinct = {key for line in whole.lines for key in line.image_keys}
    counts = [len(line.prompt) for line in whole.lines]
    assert len(distinct) == 3
    assert len(whole.words.rows_WE) < sum(counts)
    ids = {i for line in whole.lines for i in line.prompt if i >= whole.words.first_id}
    assert ids == set(range(whole.words.first_id, whole.words.first_id + len(ids)))
    assert len(ids) == len(whole.words.rows_WE)


@pytest.mark.slow
def test_other_images_are_another_calibration(home, path, tmp_path, encoded_image):
    other = lines_of(tmp_path, lambda seed, width: encoded_image(seed + 7, width))
    (_, one), (_, two) = (read(home, each, None) for each in (path, other))
    assert [line.prompt for line in one.lines] == [line.prompt for line in two.lines]
    assert one.fingerprint != two.fingerprint
    assert {chunk.key for chunk in one.chunks}.isdisjoint(
        chunk.key for chunk in two.chunks if any(two.lines[i].image_keys for i in chunk.lines)
    )


@pytest.mark.parametrize("chunk_tokens", [pytest.param(1, marks=pytest.mark.slow), 200])
def test_gates_see_the_images(home, path, chunk_tokens):
    """Gates of 1 are the dense model, wherever visual tokens left gaps."""
    loaded, calibration = read(home, path, SEARCHES["original"])
    dense = served(home, path, DENSE.plan(loaded.signature, visual_tokens=SEARCHES["original"]))
    gated = GatedModel(loaded.model)
    for chunk in cut(calibration.lines, chunk_tokens=chunk_tokens).chunks:
        ones = torch.ones(len(chunk.lines), 2, gated.num_parts)
        logits_BCV = gated.logits(ones, chunk, "prefill")
        for row, index in enumerate(chunk.lines):
            want = dense[index]
            torch.testing.assert_close(logits_BCV[row, : len(want)], want, rtol=1e-4, atol=1e-4)


def test_a_model_is_taught_in_order(home, path):
    loaded, calibration = read(home, path, None)
    words = calibration.words
    assert words is not None
    with pytest.raises(IntegrityError, match="visual words begin at id"):
        teach(loaded.model, words)
    known = words.first_id + len(words.rows_WE)
    teach(loaded.model, VisualWords(known, words.rows_WE[:1]))


def settings_of(home: Path, path: Path, out: Path, **others: object) -> Told:
    given = {"prefill_remove": 1, "decode_remove": 1, "dtype": "float32"} | others
    return Told.of(model=str(home), calibration=str(path), out=str(out), **given)


@pytest.mark.slow
def test_healing_trains_on_images_too(home, path, tmp_path, encoded_image):
    heal = lines_of(tmp_path, lambda seed, width: encoded_image(seed + 9, width), 8)
    text = heal.read_text().splitlines()
    heal.write_text("\n".join(text[:-1]) + "\n")
    settings = settings_of(
        home, path, tmp_path, heal="all", heal_data=str(heal), visual_tokens="3", heal_steps=2
    )
    prepared = prepare(*settings)
    evaluator = open_evaluator(settings.score, settings.compute, prepared.calibration)
    training = settings.search.training()
    healer = open_healer(settings.score, settings.compute, training, evaluator, prepared.heal_data)
    assert healer is not None
    assert prepared.calibration.words is not None
    assert prepared.heal_data is not None
    assert prepared.heal_data.words is not None
    assert prepared.heal_data.words.first_id == prepared.calibration.words.first_id + len(
        prepared.calibration.words.rows_WE
    )


def test_the_same_question_about_another_image_may_train(home, path, tmp_path, encoded_image):
    same = tmp_path / "same.jsonl"
    same.write_text(path.read_text())
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(encoded_image(seed, 16 + 4 * seed))
    settings = settings_of(home, path, tmp_path, heal="all", heal_data=str(same))
    with pytest.raises(DataError, match=r"same.jsonl line 1: its prompt is also in .* line 1"):
        prepare(*settings)


@pytest.mark.slow
def test_a_search_writes_a_plan_that_prunes(home, path, tmp_path):
    run = CliRunner().invoke(
        app,
        [
            "prune", "--model", str(home), "--calibration", str(path), "--out", str(tmp_path),
            "--decode-remove", "1", "--prefill-remove", "1",
            "--visual-tokens", '{"method": "divprune", "num_keep": 3}',
        ],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    plan = PruningPlan.load(tmp_path)
    assert plan.visual_tokens == VisualTokens(method="divprune", num_keep=3)
    assert plan.stage("decode").blocks
    again = CliRunner().invoke(
        app,
        [
            "kv-select", "--model", str(home), "--plan", str(tmp_path), "--calibration", str(path),
            "--target-reduction", "3", "--dtype", "int8",
        ],
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert PruningPlan.load(tmp_path).visual_tokens == plan.visual_tokens
    report = CliRunner().invoke(
        app,
        [
            "report", "--plan", str(tmp_path), "--sensitivity", "--model", str(home),
            "--calibration", str(path),
        ],
    )  # fmt: skip
    assert report.exit_code == 0, report.output


class TestRefused:
    def test_visual_tokens_of_a_text_model(self, testbed_path, tmp_path):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"prompt": "a", "completion": "b"}\n')
        with pytest.raises(InputError, match="model type 'llama' takes no images"):
            prepare(*settings_of(testbed_path, path, tmp_path, visual_tokens="64"))

    def test_no_line_about_an_image(self, home, tmp_path):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"prompt": "a", "completion": "b"}\n')
        with pytest.raises(DataError, match="holds no line about an image"):
            prepare(*settings_of(home, path, tmp_path, visual_tokens="4"))

    @pytest.mark.parametrize("value", ["many", "0", '{"keep": 3}', "1.5"])
    def test_rules_that_are_none(self, home, path, tmp_path, value):
        with pytest.raises(InputError, match="visual_tokens"):
            settings_of(home, path, tmp_path, visual_tokens=value)

    def test_gaps_under_sliding_windows(self, path, tmp_path, tiny_llava_path):
        home = tiny_llava_path(tmp_path / "model", "llava", "mistral")
        with pytest.raises(PlanError, match="sliding windows"):
            read(home, path, SEARCHES["original"])
        read(home, path, SEARCHES["compact"])

    def test_a_broken_image(self, home, tmp_path):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"prompt": "a", "completion": "b", "image": "none.png"}\n')
        with pytest.raises(DataError, match=r"line 1: image 'none.png' is no file"):
            prepare(*settings_of(home, path, tmp_path))


def test_text_keys_stay_as_they_were(calibration):
    """Journals of text searches stay valid: images add to a key only if there are any."""
    for chunk in calibration.chunks:
        lines = [calibration.lines[i] for i in chunk.lines]
        content = [[line.prompt for line in lines], [line.continuation for line in lines]]
        assert chunk.key == hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    about = replace(calibration.lines[0], image_keys=("a",))
    changed = replace(calibration, lines=(about, *calibration.lines[1:]))
    assert changed.fingerprint != calibration.fingerprint
