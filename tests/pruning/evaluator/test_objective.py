from __future__ import annotations

import math

import pytest
import torch

from rayapp.data.lines import TokenizedLine
from rayapp.errors import SearchError
from rayapp.models.likelihood import kl
from rayapp.pruning.evaluator.calibration import cut
from rayapp.pruning.evaluator.objective import combine, line_sum, reference_of, token_values
from rayapp.pruning.settings.objective import Objective

LINES = cut(
    [
        TokenizedLine((1,), (1, 2), "long"),
        TokenizedLine((1,), (1, 2, 3, 4, 5, 6), "long"),
        TokenizedLine((1,), (1, 2), "short"),
    ]
)
SUMS = {0: 1.0, 1: 7.0, 2: 6.0}


def test_tasks_weigh_equally():
    score = combine(Objective(), LINES, SUMS, name="x")
    assert score.tasks == {"long": 1.0, "short": 3.0}
    assert score.value == 2.0
    assert score.lines == (1.0, 7.0, 6.0)


def test_tokens_weigh_equally_on_request():
    assert combine(Objective(score_by="token"), LINES, SUMS, name="x").value == 1.4


def test_the_first_token_counts_as_several():
    """As if it stood there so often; a score of equal values stays as it is."""
    heavy = Objective(first_token_weight=3)
    values = [torch.tensor([2.0, 1, 1]).double(), torch.tensor([0.5]).double()]
    assert [line_sum(heavy, one) for one in values] == [8.0, 1.5]
    assert [line_sum(Objective(), one) for one in values] == [4.0, 0.5]
    lines = cut([TokenizedLine((1,), (1, 2, 3), "a"), TokenizedLine((1,), (1,), "a")])
    sums = {n: line_sum(heavy, one) for n, one in enumerate(values)}
    assert combine(heavy, lines, sums, name="x").value == (3 * 2 + 1 + 1 + 3 * 0.5) / (5 + 3)
    alike = {n: line_sum(heavy, torch.full((c,), 0.25).double()) for n, c in enumerate((3, 1))}
    assert combine(heavy, lines, alike, name="x").value == 0.25


def test_a_subset_of_lines_is_scored_alone():
    assert combine(Objective(), LINES, {2: 6.0}, name="x").value == 3.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_not_finite_names_candidate_and_line(broken):
    with pytest.raises(SearchError, match=r"decode\[1\] scores (nan|inf) on calibration line 2"):
        combine(Objective(), LINES, {**SUMS, 1: broken}, name="decode[1]")


def test_token_values_against_the_definitions():
    torch.manual_seed(0)
    dense, plan = torch.randn(2, 3, 7).double(), torch.randn(2, 3, 7).double()
    ids = torch.randint(0, 7, (2, 3))
    p, q = dense.double().softmax(-1), plan.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    found = token_values(Objective(), reference_of(Objective(), dense), plan, ids)
    assert torch.allclose(found, kl, atol=1e-12, rtol=0)
    nll = -q.gather(-1, ids[..., None])[..., 0].log()
    found = token_values(Objective("nll"), None, plan, ids)
    assert found.dtype == torch.float64
    assert torch.allclose(found, nll, atol=1e-12, rtol=0)


def test_a_reference_keeps_logits_in_their_element_type():
    torch.manual_seed(0)
    dense, plan = torch.randn(2, 3, 7).bfloat16(), torch.randn(2, 3, 7)
    reference = reference_of(Objective(), dense)
    assert reference[0].dtype == torch.bfloat16
    found = token_values(Objective(), reference, plan, torch.zeros(2, 3, dtype=torch.int64))
    assert torch.equal(found, kl(dense, plan))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k_is_below_the_exact_kl_by_what_happens_among_the_others(k):
    torch.manual_seed(0)
    dense, plan = torch.randn(2, 3, 7) * 3, torch.randn(2, 3, 7)
    objective, ids = Objective(kl_top_k=k), torch.zeros(2, 3, dtype=torch.int64)
    found = token_values(objective, reference_of(objective, dense), plan, ids)
    p, q = dense.double().softmax(-1), plan.double().softmax(-1)
    exact = (p * (p / q).log()).sum(-1)
    others = torch.ones_like(p).scatter(-1, dense.topk(k).indices, 0.0)
    p_others, q_others = p * others, q * others
    mass = p_others.sum(-1)
    p_others, q_others = (x / x.sum(-1, keepdim=True) for x in (p_others, q_others))
    missing = mass * (p_others * (p_others / q_others).log().nan_to_num(0.0)).sum(-1)
    assert torch.allclose(found + missing, exact, atol=1e-12, rtol=0)
    assert (missing > 1e-6).any() == (k < 6)  # one other token is an outcome of its own
    assert (found >= 0).all()


@pytest.mark.parametrize("k", [7, 50])
def test_top_k_of_the_whole_vocabulary_is_exact(k):
    torch.manual_seed(0)
    dense, plan = torch.randn(4, 3, 7).double(), torch.randn(4, 3, 7).double()
    ids = torch.zeros(4, 3, dtype=torch.int64)
    exact = token_values(Objective(), reference_of(Objective(), dense), plan, ids)
    objective = Objective(kl_top_k=k)
    found = token_values(objective, reference_of(objective, dense), plan, ids)
    assert torch.allclose(found, exact, atol=1e-12, rtol=0)
