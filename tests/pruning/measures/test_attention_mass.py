"""Masses equal the attention weights that transformers' eager attention reports."""

from __future__ import annotations

import random

import pytest
import torch

from rayapp.data.lines import TokenizedLine
from rayapp.models.architecture import sliding_windows
from rayapp.plan import KVTransfer
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.evaluator.calibration import cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.attention_mass import measure_attention_mass
from rayapp.pruning.settings.objective import Objective

FIRST, LAST = 2, 4


def lines() -> list[TokenizedLine]:
    rng = random.Random(0)
    return [
        TokenizedLine(
            tuple(rng.choices(range(256), k=length)), tuple(rng.choices(range(256), k=4)), ""
        )
        for length in (9, 20, 20, 31)
    ]


def eager_weights(model, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """Attention ``(T, T)`` of every block, mean over heads."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return [weights[0].mean(0) for weights in found]


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_masses_are_those_of_eager_attention(tiny_model, family, first_token):
    model = tiny_model(family)
    windows = sliding_windows(model.config)
    sums = {block: torch.zeros(5) for block in range(5)}
    tokens = 0
    for line in lines():
        prefilled = len(line.prompt) - (first_token == "decode")
        total = len(line.prompt) + len(line.continuation) - 1
        tokens += total - prefilled
        weights = eager_weights(model, (*line.prompt, *line.continuation[:-1]))
        for block, weights_TT in enumerate(weights):
            held = prefilled if windows[block] is None else min(prefilled, windows[block] - 1)
            begin, end = prefilled - held, prefilled
            first, last = slice(begin, begin + FIRST), slice(end - LAST, end)
            rows = weights_TT[prefilled:]
            sums[block] += torch.stack(
                [rows[:, first].sum(), rows[:, last].sum(), rows[:, prefilled:].sum(),
                 weights_TT[prefilled - 1, first].sum(), weights_TT[prefilled - 1, last].sum()]
            )  # fmt: skip
    objective = Objective(first_token=first_token)
    evaluator = Evaluator(model, cut(lines(), chunk_tokens=60), objective)
    found = measure_attention_mass(evaluator, DENSE, KVTransfer(first=FIRST, last=LAST))
    assert [mass.block for mass in found] == list(range(5))
    for mass in found:
        first, last, new = (sums[mass.block][:3] / tokens).tolist()
        assert (mass.first, mass.last, mass.new) == pytest.approx((first, last, new), abs=1e-5)
        assert mass.kept == pytest.approx(first + last + new, abs=1e-5)
        prompt = (sums[mass.block][3:] / 4).tolist()
        assert [mass.prompt_first, mass.prompt_last] == pytest.approx(prompt, abs=1e-5)
        assert 0.01 < mass.kept < 0.99


def test_a_block_plan_is_measured_as_it_runs(tiny_model):
    model = tiny_model("llama")
    evaluator = Evaluator(model, cut(lines()), Objective())
    rule = KVTransfer(first=FIRST, last=LAST)
    plan = Candidate((4, 5, 6, 7), (6, 7))  # prefill: kv_only 2, removed 3; decode: removed 3
    found = {mass.block: mass for mass in measure_attention_mass(evaluator, plan, rule)}
    dense = {mass.block: mass for mass in measure_attention_mass(evaluator, DENSE, rule)}
    assert sorted(found) == [0, 1, 2, 4]
    assert found[1] == dense[1]
    assert found[2].prompt_first is None
    assert found[2].kept == pytest.approx(dense[2].kept, abs=1e-6)  # same KV, same decode below it
    assert found[4].kept != pytest.approx(dense[4].kept, abs=1e-4)


def test_what_covers_a_prompt_keeps_all(tiny_model):
    evaluator = Evaluator(tiny_model("qwen3"), cut(lines()), Objective())
    for rule in (KVTransfer(), KVTransfer(first=1, last=1.0)):
        for mass in measure_attention_mass(evaluator, DENSE, rule):
            assert mass.kept == pytest.approx(1.0)
            assert mass.last == 0
