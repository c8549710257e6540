"""Multiple choice against transformers' own forward, one sequence at a time."""

from __future__ import annotations

import json
import random

import pytest
import torch

from rayapp.data.lines import ChoiceLine, TokenizedLine
from rayapp.errors import DataError
from rayapp.evaluation.data import read_data
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.measures.choices import choice_likelihoods, tokenize_question
from rayapp.evaluation.measures.likelihood import TwoStages
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.table import markdown
from rayapp.models.blocks import signature_of
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import KVTransfer, Mode, PruningPlan, StagePlan
from rayapp.pruning.evaluator.naive import teacher_forced

QUALITY = EvaluationSettings(num_runs=0, num_resamples=200, split="test")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def lines():
    """Prompts of three lengths; two to four choices of one to six characters."""
    rng = random.Random(3)

    def text(count: int) -> str:
        return "".join(rng.choices("abcdefgh", k=count))

    found = []
    for number in range(12):
        choices = [" " + text(rng.randint(1, 6)) for _ in range(2 + number % 3)]
        answer = rng.randrange(len(choices))
        task = ("even", "odd")[number % 2]
        prompt = text((12, 12, 21)[number % 3])
        found.append({"prompt": prompt, "choices": choices, "answer": answer, "task": task})
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("data") / "choices.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@torch.inference_mode()
def forward_sum(model, prompt: str, choice: str) -> float:
    """Log-likelihood of a choice from one plain forward, as the harness computes it."""
    ids = list((prompt + choice).encode())
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))


def questions_of(lines, tokenizer):
    parsed = [ChoiceLine.model_validate(line) for line in lines]
    return [tokenize_question(line, tokenizer, "here", 512) for line in parsed]


def plan_of(signature, first_token="prefill"):
    return PruningPlan(
        model=signature,
        first_token=first_token,
        prefill=StagePlan(blocks={1: Mode.KV_ONLY, 3: Mode.REMOVED}),
        decode=StagePlan(blocks={3: Mode.REMOVED}),
        kv_transfer={0: KVTransfer(first=2, last=4)},
    )


def test_dense_sums_and_accuracies_are_those_of_the_harness(checkpoint, data, lines):
    model = load_model(checkpoint).model
    sums = [[forward_sum(model, line["prompt"], c) for c in line["choices"]] for line in lines]
    tokenizer = load_model(checkpoint).tokenizer
    found = dict(
        choice_likelihoods(TwoStages(model, PruningPlan()), questions_of(lines, tokenizer))
    )
    for index, expected in enumerate(sums):
        assert found[index] == pytest.approx(expected, abs=1e-4)
    result = evaluate(checkpoint, None, [data], settings=QUALITY)
    for row in result.choices:
        mine = [i for i, line in enumerate(lines) if line["task"] == row.task]
        acc = [
            max(range(len(sums[i])), key=sums[i].__getitem__) == lines[i]["answer"] for i in mine
        ]
        per_character = [
            [s / len(c.lstrip()) for s, c in zip(sums[i], lines[i]["choices"], strict=True)]
            for i in mine
        ]
        norm = [
            max(range(len(s)), key=s.__getitem__) == lines[i]["answer"]
            for s, i in zip(per_character, mine, strict=True)
        ]
        assert row.num_examples == len(mine) == 6
        assert row.dense_acc == row.plan_acc == pytest.approx(sum(acc) / 6)
        assert row.dense_acc_norm == row.plan_acc_norm == pytest.approx(sum(norm) / 6)
        assert row.acc_lost.upper == row.acc_norm_lost.upper == 0.0
    assert result.choice_mean.dense_acc == pytest.approx(
        sum(row.dense_acc for row in result.choices) / 2
    )
    assert any(row.dense_acc != row.dense_acc_norm for row in result.choices), "norm must matter"
    assert not result.tasks
    assert result.mean is None
    assert "acc_norm plan" in markdown(result)


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_a_plan_agrees_with_the_naive_oracle(tiny_model, byte_tokenizer, lines, first_token):
    model = tiny_model("llama")
    plan = plan_of(signature_of(model), first_token)
    questions = questions_of(lines, byte_tokenizer)
    found = dict(choice_likelihoods(TwoStages(model, plan), questions))
    for index, question in enumerate(questions[:4]):
        for ids, total in zip(question.choices, found[index], strict=True):
            with torch.inference_mode():
                line = TokenizedLine(question.prompt, ids, "")
                logprobs = teacher_forced(model, plan, line).double().log_softmax(-1)
            expected = float(logprobs[range(len(ids)), list(ids)].sum())
            assert total == pytest.approx(expected, abs=1e-4)


def test_bytes_are_those_of_the_prompts(checkpoint, data, lines):
    result = evaluate(checkpoint, plan_of(read_signature(checkpoint)), [data], settings=QUALITY)
    entry = 2 * 2 * 16 * 4  # K and V, heads, head dimension, float32
    lengths = [len(line["prompt"]) for line in lines]
    assert result.choice_mean.bytes_full == sum(lengths) * entry * 5
    sent = result.choice_mean.bytes_sent - result.choice_mean.overhead_bytes
    assert sent == sum(entry * (3 * n + 6) for n in lengths)  # blocks 1, 2 and 4; block 0
    assert result.choice_mean.reduction == pytest.approx(
        result.choice_mean.bytes_full / result.choice_mean.bytes_sent
    )


def test_spaces_that_end_the_prompt_go_to_the_choices(byte_tokenizer):
    line = ChoiceLine(prompt="ab \n", choices=["c", " de"], answer=0)
    question = tokenize_question(line, byte_tokenizer, "here", 512)
    assert bytes(question.prompt) == b"ab"
    assert [bytes(ids) for ids in question.choices] == [b" \nc", b" \n de"]
    assert question.num_characters == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "choices": ["b", "c"]}', "line 2: `answer` is missing; every line needs"),
        ('{"prompt": "a", "answer": 0}', "line 2: `choices` is missing"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "line 2: `answer` is 2, but the 2"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}', "line 2: `answer` is -1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "b"}', "line 2: `answer`: Input should"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "line 2: `choices`: List should have"),
        ('{"prompt": "a", "choices": ["b", " "], "answer": 0}', "line 2: `choices.1` is blank"),
        ('{"prompt": "a", "choices": ["b", 3], "answer": 0}', "line 2: `choices.1` is not a"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 0, "gold": 1}', "unknown key `gold`"),
        ('{"prompt": " ", "choices": ["b", "c"], "answer": 0}', "line 2: the prompt or a choice"),
        ('{"prompt": "' + 600 * "a" + '", "choices": ["b", "c"], "answer": 0}', "context of 512"),
        ('{"prompt": "a", "completion": "b"}', "holds completions here and choices in"),
    ],
)
def test_a_malformed_line_is_named(byte_tokenizer, tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}\n' + text + "\n")
    with pytest.raises(DataError) as error:
        read_data([path], byte_tokenizer, max_positions=512, settings=QUALITY)
    assert f"{path} line 2" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
