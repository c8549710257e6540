from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rayapp.cli import app
from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import DataError, InputError, ModelError
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.report.findings import gather
from rayapp.evaluation.report.page import render_report
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.visual.result import VISUAL_FILE, VisualQuality
from rayapp.evaluation.visual.study import compare, study_of
from rayapp.models.loading import load_model
from rayapp.plan import PruningPlan, VisualTokens
from rayapp.testbed.vision.questions.questions import TYPES
from rayapp.vision.llava import load_image_processor
from rayapp.vision.selection import METHODS

SMALL = ["--budgets", 8, 4, "--sample-budget", 4, "--sweep-budgets", 4, "--shares", 0.1, 0.5, 1.0]


@pytest.fixture(scope="module")
def model(tiny_llava_path, tmp_path_factory) -> Path:
    """A tiny LLaVA that writes letters; every token ends an answer, so that the first decides."""
    home = tiny_llava_path(tmp_path_factory.mktemp("model") / "tiny", "llava")
    weights = load_file(home / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("lm_head.weight"))
    weights[head][[token for token in range(300) if chr(token) not in ascii_lowercase]] = 0.0
    save_file(weights, home / "model.safetensors", metadata={"format": "pt"})
    file = home / "generation_config.json"
    settings = json.loads(file.read_text()) | {"eos_token_id": list(range(300))}
    file.write_text(json.dumps(settings))
    return home


@pytest.fixture(scope="module")
def data(model, encoded_image, tmp_path_factory) -> Path:
    """Questions that the dense model answers rightly, except every fifth."""
    home = tmp_path_factory.mktemp("questions")
    for seed in range(2):
        (home / f"{seed}.png").write_bytes(encoded_image(seed))
    loaded = load_model(model)
    pipe = LocalPipeline(
        loaded.model, loaded.tokenizer, image_processor=load_image_processor(model)
    )
    lines = []
    for number in range(16):
        prompt = f"<image>\nwhat {number} ?"
        asked = ImagePrompt(prompt, [home / f"{number % 2}.png"])
        (token,) = pipe.generate([asked], SamplingParams(max_tokens=1))[0].token_ids
        answer = "A" if number % 5 == 0 else chr(token)
        task = "ab"[number // 2 % 2]
        line = {"prompt": prompt, "completion": answer, "task": task, "image": f"{number % 2}.png"}
        lines.append(json.dumps(line) + "\n")
    path = home / "questions.jsonl"
    path.write_text("".join(lines))
    return path


def test_visual_quality(run_script, model, data, tmp_path) -> None:
    home = PruningPlan(model=load_model(model).signature).save(tmp_path / "plan").parent
    out = run_script(
        "visual_quality", "--model", model, "--data", data, *SMALL, "--beside", home,
        "--name", "named", "--samples", 2, "--split", "test",
    )  # fmt: skip
    stem = out / "visual_quality-named"
    record = json.loads(stem.with_suffix(".json").read_text())
    found = VisualQuality.model_validate(record["comparison"])
    assert [(row.method, row.num_keep) for row in found.rows] == [
        (method, keep) for method in METHODS for keep in (8, 4)
    ]
    assert [(row.num_keep, row.num_aligned) for row in found.sweep] == [(4, 0.5), (4, 1.0)]
    assert sum(found.num_examples.values()) == 16
    assert found.num_visual_tokens == (16, 16)
    _equals_the_evaluation(found, model, data)
    # With nothing dropped before it, the second stage is diversity alone.
    by_key = {(row.method, row.num_keep): row.exact_match for row in found.rows}
    assert found.sweep[1].exact_match == by_key["diversity", 4]
    assert [(s.alone, s.num_keep) for s in found.stages] == [
        (alone, keep) for keep in (8, 4) for alone in ("alignment", "diversity")
    ]
    text = stem.with_suffix(".md").read_text()
    for words in (
        "tiny",
        "16 questions of the test split",
        "cls_attention",
        "fastv",
        "0.5",
        "(n = ",
    ):
        assert words in text
    assert "<svg" in stem.with_suffix(".svg").read_text()
    assert VisualQuality.parse((home / VISUAL_FILE).read_bytes(), "x") == found
    page = render_report(gather(home))
    assert "Which tokens are kept" in page
    assert [sample.task for sample in found.samples] == ["a", "b"]
    view = found.samples[0].views[0]
    assert (view.rows, view.columns) == (4, 4)
    assert {method: len(kept) for method, kept in view.kept.items()} == dict.fromkeys(METHODS, 4)


def _equals_the_evaluation(found: VisualQuality, model: Path, data: Path) -> None:
    """`rayapp evaluate`, through the engines, says the same of dense and of methods."""
    settings = EvaluationSettings(num_runs=0, num_resamples=100)
    signature, seen = load_model(model).signature, set()
    for row in found.rows[::5]:
        rule = VisualTokens(method=row.method, num_keep=row.num_keep)
        plan = PruningPlan(model=signature, visual_tokens=rule)
        result = evaluate(model, plan, [data], settings=settings)
        for task in result.tasks:
            assert task.dense_exact_match == found.dense[task.task]
            assert task.plan_exact_match == row.exact_match[task.task]
            assert task.points_lost.mean == pytest.approx(row.lost[task.task].mean)
            seen.add(task.plan_exact_match)
    assert len(seen) > 2


def test_what_cannot_be_compared_is_refused(run_script, model, data, tmp_path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="no question about an image"):
        run_script("visual_quality", "--model", model, "--data", text, *SMALL)
    few = ["--budgets", 8, "--sample-budget", 64]
    with pytest.raises(InputError, match="64 tokens in pictures are none of the budgets 8"):
        run_script("visual_quality", "--model", model, "--data", data, *few)


def test_the_command_compares_too(model, data, tmp_path) -> None:
    """`rayapp evaluate` prints all methods, and its report shows them."""
    home = PruningPlan(model=load_model(model).signature).save(tmp_path / "plan").parent
    asked = ["evaluate", "--model", str(model), "--plan", str(home), "--data", str(data)]
    asked += ["--runs", "0", "--split", "test", "--out", str(home / "evaluation.json")]
    run = CliRunner().invoke(
        app, [*asked, "--compare-visual-tokens", "4", "--compare-visual-tokens", "8"]
    )
    assert run.exit_code == 0, run.output
    found = VisualQuality.parse((home / VISUAL_FILE).read_bytes(), "x")
    assert found.budgets == (4, 8)
    assert found.methods == tuple(METHODS)
    assert {sample.num_keep for sample in found.samples} == {8}
    for method in METHODS:
        assert method in run.output
    assert "Which tokens are kept" in render_report(gather(home))


def test_a_text_model_has_no_visual_tokens_to_compare(testbed_path, tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ModelError, match="takes no images"):
        compare(testbed_path, [path], study_of([8]), settings=EvaluationSettings())


def test_the_shipped_model_brings_its_own_questions(run_script) -> None:
    few = ["--methods", "diversity", "--budgets", 64, "--sweep-budgets", "--samples", 1]
    out = run_script("visual_quality", "--scenes", 3, *few)
    record = json.loads((out / "visual_quality-testbed-vision.json").read_text())
    found = VisualQuality.model_validate(record["comparison"])
    assert found.split == "test"
    assert found.num_examples == dict.fromkeys(sorted(TYPES), 3)
    assert sum(found.dense.values()) / len(TYPES) >= 0.9
