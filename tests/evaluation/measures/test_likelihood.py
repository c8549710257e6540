"""Teacher-forced likelihoods against transformers' own forward and against the naive oracle."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch import nn

from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import LocalPipeline
from rayapp.evaluation.measures.answers import judge_answers
from rayapp.evaluation.measures.likelihood import LineLikelihood, TwoStages, likelihoods
from rayapp.models.blocks import signature_of
from rayapp.models.loading import load_model
from rayapp.plan import KVTransfer, Mode, PruningPlan, StagePlan
from rayapp.pruning.evaluator.naive import teacher_forced
from rayapp.testbed import text_model_path
from rayapp.testbed.tasks import TASKS, generate


def random_lines(count: int = 6, seed: int = 0) -> list[TokenizedLine]:
    """Lines that share some prompt lengths, with continuations of different lengths."""
    rng = random.Random(seed)
    return [
        TokenizedLine(
            prompt=tuple(rng.choices(range(256), k=(20, 20, 31)[i % 3])),
            continuation=(*rng.choices(range(256), k=1 + i % 4), 256),
            task="a",
        )
        for i in range(count)
    ]


def measured(model, plan: PruningPlan, lines: list[TokenizedLine]) -> list[LineLikelihood]:
    found = dict(likelihoods(TwoStages(model, PruningPlan()), TwoStages(model, plan), lines))
    return [found[i] for i in range(len(lines))]


@torch.inference_mode()
def forward_logprobs(model, line: TokenizedLine) -> torch.Tensor:
    """Log-probabilities ``(C, V)`` of the continuation, from one plain forward."""
    ids = torch.tensor([[*line.prompt, *line.continuation]])
    logits = model(input_ids=ids).logits[0, len(line.prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def without_block(model, block: int):
    """The model with one block cut out, by hand."""
    cut = copy.deepcopy(model)
    layers = [layer for i, layer in enumerate(cut.model.layers) if i != block]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    cut.model.layers = nn.ModuleList(layers)
    cut.config.num_hidden_layers = len(layers)
    return cut


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_agrees_with_transformers_forward(tiny_model, family):
    model, lines = tiny_model(family), random_lines()
    plan = PruningPlan(
        model=signature_of(model),
        prefill=StagePlan(blocks={2: Mode.REMOVED}),
        decode=StagePlan(blocks={2: Mode.REMOVED}),
    )
    cut = without_block(model, 2)
    for line, sums in zip(lines, measured(model, plan, lines), strict=True):
        dense, pruned = forward_logprobs(model, line), forward_logprobs(cut, line)
        rows, ids = range(len(line.continuation)), list(line.continuation)
        assert sums.num_tokens == len(ids)
        assert sums.dense_nll == pytest.approx(float(-dense[rows, ids].sum()), abs=1e-4)
        assert sums.plan_nll == pytest.approx(float(-pruned[rows, ids].sum()), abs=1e-4)
        kl = sum(
            math.fsum((p.exp() * (p - q)).tolist()) for p, q in zip(dense, pruned, strict=True)
        )
        assert sums.kl == pytest.approx(kl, abs=1e-4)
        assert sums.kl > 0.01


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_a_plan_of_every_mode_agrees_with_the_naive_oracle(tiny_model, family, first_token):
    model, lines = tiny_model(family), random_lines()
    plan = PruningPlan(
        model=signature_of(model),
        first_token=first_token,
        prefill=StagePlan(
            blocks={0: Mode.ATTENTION_ONLY, 1: Mode.KV_ONLY, 2: Mode.MLP_AND_KV, 3: Mode.REMOVED}
        ),
        decode=StagePlan(blocks={2: Mode.ATTENTION_ONLY, 3: Mode.MLP_ONLY}),
        kv_transfer={0: KVTransfer(first=2, last=0.25), 4: KVTransfer(encoding="int8")},
    )
    for line, sums in zip(lines, measured(model, plan, lines), strict=True):
        with torch.inference_mode():
            logprobs = teacher_forced(model, plan, line).double().log_softmax(-1)
            dense = teacher_forced(model, PruningPlan(), line).double().log_softmax(-1)
        rows, ids = range(len(line.continuation)), list(line.continuation)
        assert sums.plan_nll == pytest.approx(float(-logprobs[rows, ids].sum()), abs=1e-4)
        assert sums.kl == pytest.approx(float((dense.exp() * (dense - logprobs)).sum()), abs=1e-4)


def test_the_empty_plan_has_no_kl(tiny_model):
    for sums in measured(tiny_model("llama"), PruningPlan(), random_lines()):
        assert abs(sums.kl) < 1e-9
        assert sums.plan_nll == sums.dense_nll


def test_a_prompt_of_one_token_under_decode_first(tiny_model):
    model = tiny_model("llama")
    plan = PruningPlan(model=signature_of(model), first_token="decode")
    (sums,) = measured(model, plan, [TokenizedLine((65,), (66, 256), "a")])
    assert sums.plan_nll == pytest.approx(sums.dense_nll, abs=1e-5)


def test_a_teacher_forced_match_is_what_greedy_decoding_gives():
    loaded = load_model(text_model_path(), dtype="float32")
    plan = PruningPlan(
        model=loaded.signature,
        prefill=StagePlan(blocks={5: Mode.KV_ONLY}),
        decode=StagePlan(blocks={2: Mode.REMOVED, 6: Mode.REMOVED}),
    )
    examples = [
        e for task in TASKS for e in generate(task, "validation", 4, seed=5, length="short")
    ]
    lines = [
        TokenizedLine(
            tuple(loaded.tokenizer(example.prompt)["input_ids"]),
            (
                *loaded.tokenizer(example.completion, add_special_tokens=False)["input_ids"],
                loaded.tokenizer.eos_token_id,
            ),
            example.task,
        )
        for example in examples
    ]
    measurements = measured(loaded.model, plan, lines)
    for side, chosen in (("dense_match", PruningPlan()), ("plan_match", plan)):
        judged = judge_answers(
            LocalPipeline(loaded.model, plan=chosen), lines, end_token_ids=loaded.eos_token_ids
        )
        found = [getattr(sums, side) for sums in measurements]
        assert found == [answer.is_match for answer in judged]
    assert 0 < sum(found) < len(lines), "a plan that loses some and keeps some shows a difference"
