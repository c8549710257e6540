"""TrimTokenator against its definition, computed pair by pair in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.errors import PlanError
from rayapp.vision.tokens import resolve_budget, select_visual_tokens, select_visual_tokens_batch

# What the room's fixed point treats as a tie.
TIE = 2.0**-31


def naive(visual: list[list[float]], text: list[list[float]], aligned: int, keep: int) -> list[int]:
    """The paper's two stages, with every distance and every cosine written out."""
    survivors = list(range(len(visual)))
    if text:
        scores = [
            -sum((x - y) ** 2 for t in text for x, y in zip(v, t, strict=True)) / len(text)
            for v in visual
        ]
        survivors = sorted(sorted(survivors, key=lambda i: -scores[i])[:aligned])

    def cosine(a: int, b: int) -> float:
        norms = math.hypot(*visual[a]) * math.hypot(*visual[b])
        dot = sum(x * y for x, y in zip(visual[a], visual[b], strict=True))
        return dot / norms if norms else 0.0

    def lowest(candidates: list[int], others: list[int]) -> int:
        means = {c: sum(cosine(c, o) for o in others) / len(others) for c in candidates}
        floor = min(means.values())
        return min(c for c in candidates if means[c] <= floor + TIE)

    chosen = [lowest(survivors, survivors)]
    while len(chosen) < keep:
        chosen.append(lowest([i for i in survivors if i not in chosen], chosen))
    return sorted(chosen)


def check(visual: torch.Tensor, text: torch.Tensor, aligned: int, keep: int) -> None:
    got = select_visual_tokens(visual, text, num_aligned=aligned, num_keep=keep)
    assert got.dtype == torch.int64
    expected = naive(visual.double().tolist(), text.double().tolist(), aligned, keep)
    assert got.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition_on_random_tokens(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(40, 12, generator=generator).to(dtype)
    text = torch.randn(7, 12, generator=generator).to(dtype)
    check(visual, text, aligned=24, keep=9)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=2, max_size=14),
    words=st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), max_size=4),
    data=st.data(),
)
def test_equals_the_definition_where_tokens_tie(
    rows: list[list[int]], words: list[list[int]], data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, len(rows) - 1))
    aligned = data.draw(st.integers(keep, len(rows)))
    text = torch.tensor(words, dtype=torch.float32).reshape(-1, 3)
    check(torch.tensor(rows, dtype=torch.float32), text, aligned, keep)


def test_identical_tokens_are_taken_from_the_lowest_index() -> None:
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(50, 33, generator=generator)
    visual = distinct.repeat(3, 1)
    text = torch.randn(4, 33, generator=generator)
    kept = select_visual_tokens(visual, text, num_aligned=150, num_keep=40)
    check(visual, text, aligned=150, keep=40)
    copies = [(int(i) % 50, int(i) // 50) for i in kept]
    for token, copy in copies:
        assert all((token, earlier) in copies for earlier in range(copy))
    same = torch.ones(9, 4)
    assert select_visual_tokens(same, same, num_keep=3).tolist() == [0, 1, 2]


def test_zero_vectors_have_no_direction_and_do_no_harm() -> None:
    visual = torch.zeros(6, 4)
    assert select_visual_tokens(visual, torch.zeros(2, 4), num_keep=2).tolist() == [0, 1]
    visual[3] = torch.tensor([1.0, 2.0, 0.0, 0.0])
    check(visual, torch.zeros(2, 4), aligned=5, keep=3)


def test_a_batch_gives_what_each_image_gives_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    visual = torch.randn(4, 30, 17, generator=generator)
    visual[1, 10:20] = visual[1, :10]
    texts = [torch.randn(m, 17, generator=generator) for m in (1, 5, 0, 9)]
    batch = select_visual_tokens_batch(visual, texts, num_aligned=20, num_keep=7)
    for row, image, text in zip(batch, visual, texts, strict=True):
        alone = select_visual_tokens(image, text, num_aligned=20, num_keep=7)
        assert row.tolist() == alone.tolist()


def test_without_text_only_diversity_decides() -> None:
    visual = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))
    empty = torch.zeros(0, 6)
    narrow = select_visual_tokens(visual, empty, num_aligned=8, num_keep=5)
    assert narrow.tolist() == naive(visual.double().tolist(), [], 20, 5)


def test_kept_tokens_ignore_what_the_alignment_stage_dropped() -> None:
    text = torch.tensor([[1.0, 0.0, 0.0]])
    near = torch.tensor([[1.0, 0.1, 0.0], [1.0, -0.1, 0.0], [1.0, 0.0, 0.1]])
    far = torch.tensor([[-9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    visual = torch.cat([far[:1], near, far[1:]])
    assert select_visual_tokens(visual, text, num_aligned=3, num_keep=3).tolist() == [1, 2, 3]
    # Without the alignment stage the outliers would be the first to be kept.
    assert 0 in select_visual_tokens(visual, text, num_aligned=5, num_keep=2).tolist()


@pytest.mark.parametrize(
    ("num_aligned", "num_keep", "expected"),
    [
        (None, 64, (461, 64)),
        (None, 0.5, (461, 288)),
        (None, 500, (500, 500)),
        (None, 9999, (576, 576)),
        (0.2, 0.1, (116, 58)),
        (100, 100, (100, 100)),
        (9999, 9999, (576, 576)),
        (None, 1e-9, (461, 1)),
    ],
)
def test_budgets_are_counts_or_shares(
    num_aligned: float | None, num_keep: float, expected: tuple[int, int]
) -> None:
    assert resolve_budget(576, num_aligned=num_aligned, num_keep=num_keep) == expected


@pytest.mark.parametrize(
    ("num_aligned", "num_keep"),
    [(None, 0), (None, 0.0), (None, -3), (None, 64.0), (63, 64), (0.1, 0.2), (0, 5), (1.5, 5)],
)
def test_contradictory_budgets_are_refused(num_aligned: float | None, num_keep: float) -> None:
    visual = torch.randn(576, 4)
    with pytest.raises(PlanError, match=r"num_(keep|aligned)="):
        select_visual_tokens(visual, visual[:3], num_aligned=num_aligned, num_keep=num_keep)


def test_a_budget_above_the_tokens_keeps_all_in_order() -> None:
    visual = torch.randn(10, 4)
    assert select_visual_tokens(visual, visual, num_keep=11).tolist() == list(range(10))
    assert select_visual_tokens(visual[:0], visual, num_keep=5).tolist() == []
    assert select_visual_tokens(visual[:1], visual, num_keep=1).tolist() == [0]


def test_no_matrix_of_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product has more entries than there are tokens: no N x M, no N x N."""
    largest = 0
    make = torch.bmm

    def watch(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        product = make(left, right)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch, "bmm", watch)
    visual, text = torch.randn(3000, 4), torch.randn(2000, 4)
    select_visual_tokens(visual, text, num_keep=4)
    assert largest == 3000
