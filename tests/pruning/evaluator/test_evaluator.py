from __future__ import annotations

import random

import pytest
import torch

from rayapp.data.lines import TokenizedLine
from rayapp.models.blocks import signature_of
from rayapp.models.likelihood import nll
from rayapp.plan import STAGES, KVTransfer
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import Calibration, cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import naive_scores, teacher_forced
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective

RULES = {
    1: KVTransfer(first=2, last=3, encoding="int8"),
    2: KVTransfer(encoding="int4"),
    3: KVTransfer(last=0.5),
}
# Stages and rules meet in the plainest family and in that with windows; the others differ in their
# projections only.
CASES = [
    *((family, stage, RULES) for family in ("llama", "mistral") for stage in STAGES),
    ("llama", "prefill", {}),
    pytest.param("llama", "decode", {}, marks=pytest.mark.slow),
    ("mistral", "decode", {}),
    pytest.param("mistral", "prefill", {}, marks=pytest.mark.slow),
    pytest.param("qwen2", "prefill", RULES, marks=pytest.mark.slow),
    pytest.param("qwen3", "decode", RULES, marks=pytest.mark.slow),
]  # fmt: skip


def scores(evaluator: Evaluator, candidates: list[Candidate]) -> list[Score]:
    scorer = Scorer(
        evaluator.calibration, evaluator.objective, LocalCompute(evaluator), weights="w"
    )
    return scorer.score_many(candidates)


def draw(seed: int = 0) -> list[Candidate]:
    rng = random.Random(seed)
    parts, blocks = Space(5, 1.5, 1.0, "part"), Space(5, 2, 1)
    return [DENSE, *(parts.draw(rng) for _ in range(2)), blocks.draw(rng)]


@pytest.mark.parametrize(("family", "first_token", "rules"), CASES)
def test_reuse_equals_the_naive_score(tiny_model, few, family, first_token, rules):
    model = tiny_model(family)
    objective = Objective(first_token=first_token, kv_transfer=rules)
    candidates = draw()
    wanted = naive_scores(model, few, objective, candidates)
    for cache_bytes in (1 << 30, 60_000, 0):
        evaluator = Evaluator(model, few, objective, cache_bytes=cache_bytes)
        for found, want in zip(scores(evaluator, candidates), wanted, strict=True):
            assert abs(found.value - want.value) <= 1e-5 * want.value + 1e-7
            assert found.tasks.keys() == want.tasks.keys() == {"a", "b"}
    assert (wanted[0].value > 0.01) == bool(rules)  # the dense reference is uncut
    assert all(want.value > 0.01 for want in wanted[1:])


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_a_heavy_first_token_is_the_same_with_reuse_and_without(tiny_model, few, first_token):
    model, candidates = tiny_model("llama"), draw(1)
    objective = Objective(first_token=first_token, first_token_weight=16)
    found = scores(Evaluator(model, few, objective), candidates)
    plain = scores(Evaluator(model, few, Objective(first_token=first_token)), candidates)
    for mine, naive in zip(found, naive_scores(model, few, objective, candidates), strict=True):
        assert abs(mine.value - naive.value) <= 1e-5 * naive.value + 1e-7
    assert [one.value for one in found] != [one.value for one in plain]


def test_scores_do_not_depend_on_company_order_or_cache(tiny_model, calibration):
    model, candidates = tiny_model("qwen3"), draw(1)
    together = scores(Evaluator(model, calibration, Objective()), candidates)
    backwards = scores(Evaluator(model, calibration, Objective(), cache_bytes=0), candidates[::-1])
    assert [s.lines for s in together] == [s.lines for s in backwards[::-1]]
    alone = scores(Evaluator(model, calibration, Objective()), candidates[3:4])
    assert alone[0].lines == together[3].lines


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_dense_nll_is_that_of_the_models_own_forward(tiny_model, calibration, first_token):
    model = tiny_model("llama")
    objective = Objective("nll", first_token=first_token)
    found = scores(Evaluator(model, calibration, objective), [DENSE])[0]
    for line, total in zip(calibration.lines, found.lines, strict=True):
        ids = torch.tensor([[*line.prompt, *line.continuation]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(line.prompt) - 1 : -1]
        assert total == pytest.approx(
            float(nll(logits, torch.tensor(line.continuation)).sum()), 1e-5
        )


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_the_oracle_is_the_models_own_forward_where_nothing_is_cut(tiny_model, first_token):
    model = tiny_model("mistral")
    rng = random.Random(0)
    line = TokenizedLine(
        tuple(rng.choices(range(256), k=30)), tuple(rng.choices(range(256), k=9)), ""
    )
    plan = DENSE.plan(signature_of(model), first_token=first_token)
    with torch.no_grad():
        found = teacher_forced(model, plan, line)
        wanted = model(torch.tensor([[*line.prompt, *line.continuation]])).logits[0, 29:-1]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_decode_only_candidates_run_no_prefill(tiny_model, calibration):
    model = tiny_model("llama")
    one = Calibration(calibration.lines[:2], cut(calibration.lines[:2]).chunks)
    evaluator = Evaluator(model, one, Objective())
    scores(evaluator, [DENSE])
    before = evaluator.blocks_run
    scores(evaluator, [Candidate((), (6, 7))])  # block 3 of 5: block 4 runs again, block 3 does not
    assert evaluator.blocks_run - before == 2 * len(one.chunks)
    tokens = evaluator.forwards
    scores(evaluator, [Candidate((), (4, 5))])  # block 2: blocks 3 and 4 run on the answer only
    answers = sum(len(line.continuation) - 1 for line in one.lines)
    assert evaluator.forwards - tokens == 2 * answers
    before = evaluator.blocks_run
    scores(evaluator, [Candidate((6, 7), ())])  # kv_only 3: prefill and decode differ from block 4
    assert evaluator.blocks_run - before == 3 * len(one.chunks)


def test_forwards_without_reuse_are_those_of_the_modes(tiny_model, calibration):
    line = Calibration(calibration.lines[-1:], cut(calibration.lines[-1:]).chunks)
    evaluator = Evaluator(tiny_model("llama"), line, Objective(), cache_bytes=0)
    prompt, answer = len(line.lines[0].prompt), len(line.lines[0].continuation) - 1
    evaluator.line_sums([], 0)  # the dense reference
    assert evaluator.forwards == 5 * (prompt + answer)
    evaluator.forwards = 0.0
    evaluator.line_sums([Candidate((0, 1), (5,))], 0)  # kv_only 0 in prefill, no MLP 2 in decode
    dense = 5 * (prompt + answer)
    assert evaluator.forwards == dense + 4 * prompt + prompt / 2 + 4.5 * answer


def test_top_k_needs_no_more_than_it_keeps(tiny_model, calibration):
    model, candidates = tiny_model("llama"), draw(1)
    objective = Objective(kl_top_k=20)
    evaluator = Evaluator(model, calibration, objective)
    wanted = naive_scores(model, calibration, objective, candidates)
    exact = scores(Evaluator(model, calibration, Objective()), candidates)
    for found, want, most in zip(scores(evaluator, candidates), wanted, exact, strict=True):
        assert abs(found.value - want.value) <= 1e-5 * want.value + 1e-7
        assert found.value <= most.value + 1e-12
    _, reference = next(evaluator._slices(0))
    assert {tensor.shape[-1] for tensor in reference[:2]} == {20}


def test_the_cache_keeps_its_bound(tiny_model, calibration):
    evaluator = Evaluator(tiny_model("llama"), calibration, Objective(), cache_bytes=150_000)
    scores(evaluator, draw(2))
    assert 0 < evaluator._cache.nbytes <= 150_000


def kv_sets() -> list[Candidate]:
    """Rule sets over one block plan that differ early and late, some without the default rules."""
    base = Candidate((2, 3), (3, 6))
    cut, coded = KVTransfer(first=2, last=3), KVTransfer(first=1, last=0.5, encoding="int8")
    return [
        base.with_kv({0: cut, 1: coded, 4: KVTransfer(encoding="int4")}),
        base.with_kv({0: cut, 1: coded, 4: cut}),
        base.with_kv({0: cut, 1: KVTransfer(first=1, last=0.5), 2: cut}),
        base.with_kv({2: KVTransfer(last=1)}),
        DENSE.with_kv({2: coded, 3: cut}),
        base,
    ]


@pytest.mark.parametrize(
    ("family", "first_token"),
    [
        ("llama", "prefill"),
        ("mistral", "decode"),
        pytest.param("qwen2", "decode", marks=pytest.mark.slow),
        pytest.param("qwen3", "prefill", marks=pytest.mark.slow),
    ],
)
def test_own_rules_with_reuse_equal_the_naive_score(tiny_model, few, family, first_token):
    model = tiny_model(family)
    objective = Objective(first_token=first_token, kv_transfer=RULES)
    candidates = kv_sets()
    wanted = naive_scores(model, few, objective, candidates)
    assert len({want.value for want in wanted}) == len(candidates)
    for cache_bytes in (1 << 30, 60_000, 0):
        evaluator = Evaluator(model, few, objective, cache_bytes=cache_bytes)
        for found, want in zip(scores(evaluator, candidates), wanted, strict=True):
            assert abs(found.value - want.value) <= 1e-5 * want.value + 1e-7


def test_rule_sets_share_the_prefill_and_decode_below_the_first_difference(tiny_model, calibration):
    one = Calibration(calibration.lines[:2], cut(calibration.lines[:2]).chunks)
    evaluator = Evaluator(tiny_model("llama"), one, Objective())
    cut_rule, coded = KVTransfer(first=1, last=2), KVTransfer(encoding="int8")
    scores(evaluator, [DENSE.with_kv({1: cut_rule})])
    before = evaluator.blocks_run
    scores(evaluator, [DENSE.with_kv({1: cut_rule, 3: coded})])  # decode goes on from block 3
    assert evaluator.blocks_run - before == 2 * len(one.chunks)
    before = evaluator.blocks_run
    scores(evaluator, [DENSE.with_kv({4: coded})])  # the dense model's states up to block 4
    assert evaluator.blocks_run - before == len(one.chunks)
