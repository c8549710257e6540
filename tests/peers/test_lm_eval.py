"""lm-evaluation-harness, offline: its numbers are ours, on a checkpoint and over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.export import export_stage
from rayapp.models.likelihood import nll
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import PruningPlan
from tests.services import KEY

TASKS = Path(__file__).parents[2] / "benchmarks" / "lm_eval_tasks"
REMOVED = {2: "removed", 5: "removed", 8: "removed"}


@pytest.fixture
def data(tmp_path):
    """Questions for the harness."""
    arguments = ["--out", str(tmp_path / "data"), "--count", "8", "--length", "short"]
    subprocess.run([sys.executable, str(TASKS / "write_data.py"), *arguments], check=True)
    return tmp_path / "data"


def lm_eval(peer, kind, model, data, scratch):
    """Run the harness as a user does, in the directory of the data; samples by task."""
    command = [
        "-m", "lm_eval", "--model", kind, "--model_args", model,
        "--tasks", "rayapp_answers,rayapp_choices", "--include_path", TASKS,
        "--device", "cpu", "--batch_size", "1", "--log_samples",
        "--output_path", scratch / "result",
    ]  # fmt: skip
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf")}
    variables = {**offline, "OPENAI_API_KEY": KEY}
    peer("lm-eval", "python", *command, cwd=data, within_s=540, variables=variables)
    (result,) = scratch.glob("result/*/results_*.json")
    samples = {}
    for task in ("rayapp_answers", "rayapp_choices"):
        (file,) = result.parent.glob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads(result.read_text())["results"], samples


def choice_scores(pipeline, tokenizer, line):
    """Our log-likelihood of every choice, through prefill, wire and decode."""
    prompt = tokenizer(line["prompt"])["input_ids"]
    scores = []
    for choice in line["choices"]:
        ids = tokenizer(choice)["input_ids"]
        scores.append(-nll(pipeline.answer_logits(prompt, ids), torch.tensor(ids)).sum())
    return torch.stack(scores)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_harness_gives_our_numbers(peer, testbed_path, data, tmp_path):
    stages = {stage: {"blocks": REMOVED} for stage in ("prefill", "decode")}
    plan = PruningPlan.model_validate({"model": read_signature(testbed_path), **stages})
    export_stage(testbed_path, plan, "unified", tmp_path / "exported")
    model = f"pretrained={tmp_path / 'exported'},dtype=float32"
    results, samples = lm_eval(peer, "hf", model, data, tmp_path)

    loaded = load_model(testbed_path, dtype="float32")
    pipeline = LocalPipeline(loaded.model, loaded.tokenizer, plan)
    lines = [json.loads(line) for line in (data / "answers.jsonl").read_text().splitlines()]
    ours = pipeline.generate([line["prompt"] for line in lines], SamplingParams(max_tokens=32))
    theirs = {s["doc"]["prompt"]: s["filtered_resps"][0] for s in samples["rayapp_answers"]}
    assert [theirs[line["prompt"]] for line in lines] == [answer.text for answer in ours]
    matches = [a.text == line["completion"] for a, line in zip(ours, lines, strict=True)]
    accuracy = sum(matches) / len(lines)
    assert results["rayapp_answers"]["exact_match,none"] == pytest.approx(accuracy)

    right = []
    for sample in samples["rayapp_choices"]:
        line = sample["doc"]
        found = torch.tensor([float(r[0]) for r in sample["filtered_resps"]], dtype=torch.float64)
        wanted = choice_scores(pipeline, loaded.tokenizer, line)
        # It counts the newline that ends the prompt as part of every choice.
        assert torch.allclose(found - found[0], wanted - wanted[0], atol=1e-3)
        right.append(int(wanted.argmax()) == line["answer"])
    assert len(right) == len(lines) == 32
    assert results["rayapp_choices"]["acc,none"] == pytest.approx(sum(right) / len(right))
    # Neither perfect nor lost: equal numbers mean something.
    assert 0.1 < accuracy < 0.95
    assert 0.5 < sum(right) / len(right) < 1.0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_service_gives_the_harness_the_numbers_of_its_own_backend(
    peer, testbed_path, data, deploy, tmp_path
):
    """Prompts are echoed with their log-probabilities, for choices; answers are greedy."""
    own = f"pretrained={testbed_path},dtype=float32"
    with deploy(model=str(testbed_path), api_key=KEY) as service:
        served = (
            f"model=tested,base_url={service.settings.url}/v1/completions,tokenizer={testbed_path},"
            "tokenizer_backend=huggingface,num_concurrent=4"
        )
        ours = lm_eval(peer, "local-completions", served, data, tmp_path / "ours")
    theirs = lm_eval(peer, "hf", own, data, tmp_path / "theirs")
    for task, measure in (("rayapp_answers", "exact_match"), ("rayapp_choices", "acc")):
        values = [results[task][f"{measure},none"] for results, _ in (ours, theirs)]
        assert values[0] == values[1] > 0.5
        by_question = [{s["doc_id"]: s for s in samples[task]} for _, samples in (ours, theirs)]
        assert len(by_question[0]) == len(by_question[1]) == 32
        for number, one in by_question[0].items():
            other = by_question[1][number]
            if measure == "exact_match":
                assert one["filtered_resps"] == other["filtered_resps"]
                continue
            for (mine, greedy), (their, is_greedy) in zip(
                one["filtered_resps"], other["filtered_resps"], strict=True
            ):
                assert float(mine) == pytest.approx(float(their), abs=1e-3)
                assert str(greedy) == str(is_greedy)
