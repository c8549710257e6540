"""Perplexity against plain forwards, window by window; no token is lost on the way."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from rayapp.errors import DataError, InputError
from rayapp.evaluation.data import read_data
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.measures.perplexity import cut_windows
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.table import markdown
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import Mode, PruningPlan, StagePlan

QUALITY = EvaluationSettings(
    num_runs=0, num_resamples=200, num_window_tokens=40, window_prompt_share=0.25, split="test"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(5)
    return ["".join(rng.choices("abcdefgh ", k=count)) for count in (70, 0, 61, 5)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_dense_equals_a_plain_forward_of_every_window(checkpoint, data, texts):
    model, ids = load_model(checkpoint).model, list("\n\n".join(texts).encode())
    total = num_scored = 0.0
    scored: list[int] = []
    for start in range(0, len(ids) - 10, 30):
        window = ids[start : start + 40]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
        total -= sum(float(logits[i - 1, window[i]]) for i in range(10, len(window)))
        num_scored += len(window) - 10
        scored += window[10:]
    assert scored == ids[10:], "every token but the first prompt's is scored, once"
    result = evaluate(checkpoint, None, [data], settings=QUALITY)
    (row,) = result.texts
    assert row.dense_nll == pytest.approx(total / num_scored, abs=1e-5)
    assert row.dense_perplexity == pytest.approx(math.exp(total / num_scored), rel=1e-5)
    assert row.plan_nll == row.dense_nll
    assert (row.num_tokens, row.num_context_tokens, row.num_left_out) == (num_scored, 10, 0)
    assert (row.num_window_tokens, row.max_prompt_tokens) == (40, 10)
    assert row.nll_lost.upper == pytest.approx(0.0, abs=1e-12)
    assert result.text_mean.dense_nll == row.dense_nll
    assert "40 (10)" in markdown(result)


def test_a_plan_loses_and_the_limit_is_counted(checkpoint, data, texts):
    plan = PruningPlan(
        model=read_signature(checkpoint),
        prefill=StagePlan(blocks={2: Mode.REMOVED}),
        decode=StagePlan(blocks={2: Mode.REMOVED}),
    )
    settings = QUALITY.model_copy(update={"limit": 2})
    result = evaluate(checkpoint, plan, [data], settings=settings)
    (row,) = result.texts
    assert (row.num_examples, row.num_tokens) == (2, 60)
    assert row.num_left_out == len("\n\n".join(texts)) - 10 - 60
    assert any(f"{row.num_left_out} tokens of text" in each for each in result.caveats)
    assert row.kl.mean > 0.001
    assert row.nll_lost.mean == pytest.approx(row.plan_nll - row.dense_nll)
    assert row.nll_lost.upper >= row.nll_lost.mean
    assert row.bytes_sent - row.overhead_bytes == row.bytes_full * 4 // 5


@pytest.mark.parametrize(
    ("num_tokens", "window", "prompt", "sizes"),
    [
        (100, 40, 10, [30, 30, 30]),
        (101, 40, 10, [30, 30, 30, 1]),
        (40, 40, 10, [30]),
        (12, 12, 3, [9]),
        (2, 2, 1, [1]),
    ],
)
def test_windows_hold_every_token(byte_tokenizer, num_tokens, window, prompt, sizes):
    text = "".join(chr(97 + i % 26) for i in range(num_tokens))
    found = cut_windows([text], byte_tokenizer, settings=QUALITY, max_positions=512)
    assert (found.num_window_tokens, found.num_prompt_tokens) == (window, prompt)
    assert [len(line.continuation) for line in found.lines] == sizes
    scored = [token for line in found.lines for token in line.continuation]
    assert bytes([*found.lines[0].prompt, *scored]).decode() == text
    for before, after in zip(found.lines, found.lines[1:], strict=False):
        assert (*before.prompt, *before.continuation)[-prompt:] == after.prompt


def test_mixed_files_are_sorted_by_kind(byte_tokenizer, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"text": "once upon a time", "task": "wiki"}\n'
        '{"prompt": "a", "choices": ["b", "c"], "answer": 0, "task": "piqa"}\n'
        '{"prompt": "a", "completion": "b"}\n'
    )
    found = read_data([path], byte_tokenizer, max_positions=512, settings=QUALITY)
    assert (list(found.completions), list(found.choices), list(found.texts)) == (
        [""],
        ["piqa"],
        ["wiki"],
    )
    assert found.files[0].num_examples == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": 3}', "line 1: `text` is not a string"),
        ('{"text": "a", "prompt": "b"}', "line 1: unknown key `prompt`; use text and task"),
        ('{"text": "a"}', "the nameless task hold 1 tokens"),
    ],
)
def test_bad_texts_are_refused(byte_tokenizer, tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(DataError, match=message):
        read_data([path], byte_tokenizer, max_positions=512, settings=QUALITY)


def test_a_window_beyond_the_context_is_refused(byte_tokenizer):
    with pytest.raises(InputError, match="num_window_tokens=40 exceeds"):
        cut_windows(["some text"], byte_tokenizer, settings=QUALITY, max_positions=32)
