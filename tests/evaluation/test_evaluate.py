"""The whole evaluation on a small random model."""

from __future__ import annotations

import json
import random
import re

import pytest

from rayapp.errors import DataError, PlanError, RayappError
from rayapp.evaluation import sides
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.measures.answers import JudgedAnswer, judge_answers
from rayapp.evaluation.pieces import compute
from rayapp.evaluation.pieces.compute import Here
from rayapp.evaluation.result import EvaluationResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import KVTransfer, Mode, PruningPlan, StagePlan

QUALITY = EvaluationSettings(num_runs=0, num_resamples=200, split="test")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(1)
    letters = "abcdefghij"

    def text(low: int, high: int) -> str:
        return "".join(rng.choices(letters, k=rng.randint(low, high)))

    lines = [
        {"prompt": text(20, 30), "completion": text(1, 4), "task": task}
        for task in ("copy", "sort")
        for _ in range(5)
    ]
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def plan(checkpoint):
    return PruningPlan(
        model=read_signature(checkpoint),
        prefill=StagePlan(blocks={1: Mode.KV_ONLY, 3: Mode.REMOVED}),
        decode=StagePlan(blocks={3: Mode.REMOVED}),
        kv_transfer={0: KVTransfer(first=2, last=4), 2: KVTransfer(encoding="int8")},
    )


def test_the_empty_plan_changes_nothing(checkpoint, data):
    result = evaluate(checkpoint, None, [data], settings=QUALITY)
    assert result.complete
    assert [task.task for task in result.tasks] == ["copy", "sort"]
    for row in (*result.tasks, result.mean):
        assert abs(row.kl.upper) < 1e-9
        assert row.points_lost.mean == row.points_lost.upper == 0.0
        assert row.plan_nll == row.dense_nll
        # Everything travels, and the header comes on top: slightly more than the dense cache.
        assert row.bytes_sent == row.bytes_full + row.overhead_bytes
        assert 0.5 < row.reduction < 1.0


def test_a_plan_costs_quality_and_saves_bytes(checkpoint, data, plan):
    result = evaluate(checkpoint, plan, [data], settings=QUALITY)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    tokens = {"copy": 0, "sort": 0}
    for line in lines:
        tokens[line["task"]] += len(line["completion"]) + 1
    for row in result.tasks:
        assert row.num_tokens == tokens[row.task]
        assert row.kl.mean > 0.0
        assert row.kl.upper >= row.kl.mean
    lengths = [len(line["prompt"]) for line in lines]
    entry = 2 * 2 * 16 * 4  # K and V, heads, head dimension, float32
    assert result.mean.bytes_full == sum(lengths) * entry * 5
    per_prompt = [entry * (2 * n + min(n, 6)) for n in lengths]  # blocks 1 and 4; block 0
    encoded = [2 * n * 2 * 16 + 4 * (2 * 16 + 2 * n) for n in lengths]  # block 2 with its scales
    sent = result.mean.bytes_sent - result.mean.overhead_bytes
    assert sent == pytest.approx(sum(per_prompt) + sum(encoded), rel=0.05)
    assert result.mean.reduction == result.mean.bytes_full / result.mean.bytes_sent
    assert result.mean.num_examples == 10
    assert result.mean.kl.mean == pytest.approx(sum(t.kl.mean for t in result.tasks) / 2)
    assert result.mean.dense_nll == pytest.approx(sum(t.dense_nll for t in result.tasks) / 2)


def test_points_lost_are_dense_minus_plan(checkpoint, data, plan, monkeypatch):
    def scripted(pipeline, lines, **options):
        judged = judge_answers(pipeline, lines, **options)
        wrong = pipeline.plan.is_empty is False
        return [JudgedAnswer(not (wrong and i == 0), a.transfer) for i, a in enumerate(judged)]

    monkeypatch.setattr(sides, "judge_answers", scripted)
    result = evaluate(checkpoint, plan, [data], settings=QUALITY)
    for row in (*result.tasks, result.mean):
        assert (row.dense_exact_match, row.plan_exact_match) == (1.0, pytest.approx(0.8))
        assert row.points_lost.mean == pytest.approx(20.0)
        assert row.points_lost.upper > 20.0


def test_the_file_is_reproducible_and_reads_back(checkpoint, data, plan, tmp_path):
    for name in ("a.json", "b.json"):
        result = evaluate(checkpoint, plan, [data], settings=QUALITY, out=tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert EvaluationResult.load(tmp_path / "a.json") == result
    assert {"rayapp", "torch", "transformers"} <= set(result.machine.versions)
    assert result.settings.split == "test"
    assert result.data[0].num_examples == 10


def test_a_plan_directory_is_read_and_limit_and_threads_are_kept(checkpoint, data, plan, tmp_path):
    plan.save(tmp_path / "plan")
    settings = QUALITY.model_copy(update={"limit": 2})
    result = evaluate(checkpoint, tmp_path / "plan", [data], settings=settings)
    assert result.plan.fingerprint == plan.fingerprint
    assert [task.num_examples for task in result.tasks] == [2, 2]
    assert any("2 examples" in caveat for caveat in result.caveats)


def test_latency_is_measured_for_every_batch_size(checkpoint, data):
    settings = QUALITY.model_copy(
        update={
            "num_runs": 1,
            "batch_sizes": (1, 2),
            "num_prompt_tokens": 8,
            "num_answer_tokens": 3,
            "limit": 1,
        }
    )
    result = evaluate(checkpoint, None, [data], settings=settings)
    assert [timing.batch_size for timing in result.latency] == [1, 2]
    assert result.latency[0].speedup > 0


def test_finished_tasks_survive_a_failure(checkpoint, data, plan, tmp_path, monkeypatch):
    def failing(pipeline, lines, **options):
        if lines[0].task == "sort" and not pipeline.plan.is_empty:
            raise RayappError("the machine went away")
        return judge_answers(pipeline, lines, **options)

    monkeypatch.setattr(sides, "judge_answers", failing)
    out = tmp_path / "result.json"
    with pytest.raises(RayappError, match="went away"):
        evaluate(checkpoint, plan, [data], settings=QUALITY, out=out)
    kept = EvaluationResult.load(out)
    assert [task.task for task in kept.tasks] == ["copy"]
    assert not kept.complete
    assert "the evaluation did not finish" in kept.caveats


@pytest.mark.slow
def test_lines_without_a_task_and_a_second_file(checkpoint, tmp_path, data):
    more = tmp_path / "more.jsonl"
    more.write_text('{"prompt": "abcabc", "completion": "x"}\n')
    result = evaluate(checkpoint, None, [data, more], settings=QUALITY)
    assert [(t.task, t.num_examples) for t in result.tasks] == [("", 1), ("copy", 5), ("sort", 5)]
    assert [file.name for file in result.data] == ["test.jsonl", "more.jsonl"]


def test_a_plan_of_another_model_is_refused(checkpoint, data, plan):
    other = plan.model.model_copy(update={"weights_fingerprint": "v2:" + "0" * 21})
    with pytest.raises(PlanError, match="made for another model"):
        evaluate(checkpoint, plan.model_copy(update={"model": other}), [data], settings=QUALITY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "line 2: not JSON"),
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n', "line 3: `completion`"),
        ('{"prompt": "a", "completion": ""}\n', "line 1: `completion` is empty"),
        ("\n\n", "holds no line"),
        ('{"prompt": "' + "a" * 600 + '", "completion": "b"}\n', "line 1: 600 prompt tokens"),
    ],
)
def test_bad_data_is_refused_before_anything_runs(checkpoint, tmp_path, monkeypatch, text, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    monkeypatch.setattr(compute, "load_model", None)
    with pytest.raises(DataError, match=message):
        evaluate(checkpoint, None, [bad], settings=QUALITY)


def test_no_data_is_refused(checkpoint):
    with pytest.raises(DataError, match="no data"):
        evaluate(checkpoint, None, [])


def test_a_result_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="not an evaluation result"):
        EvaluationResult.load(tmp_path / "x.json")
    with pytest.raises(DataError, match="cannot be read"):
        EvaluationResult.load(tmp_path / "missing.json")


def test_the_weights_are_loaded_in_the_type_that_was_asked_for(checkpoint, data):
    settings = QUALITY.model_copy(update={"limit": 1})
    result = evaluate(checkpoint, None, [data], settings=settings, place=Here(dtype="bfloat16"))
    assert result.dtype == "bfloat16"
    assert result.model == load_model(checkpoint).signature
    assert abs(result.mean.kl.mean) < 1e-9


def test_the_job(checkpoint, data, tmp_path, run_job_here):
    common = ["--model", str(checkpoint), "--runs", "0", "--data"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense\n")
    refused = run_job_here("evaluate", *common, bad)
    assert refused.returncode == 2
    assert "line 1: not JSON" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    out = tmp_path / "result.json"
    done = run_job_here("evaluate", *common, data, "--limit", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert re.search(r"copy +│ +2 ", done.stdout), done.stdout
    assert "copy: likelihood: 2/2" in done.stderr
    assert EvaluationResult.load(out).complete
