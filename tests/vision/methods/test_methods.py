"""Every baseline against its definition, by brute force where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rayapp.errors import IntegrityError
from rayapp.vision.methods.alignment import alignment_scores, most_aligned
from rayapp.vision.methods.attended import cls_attended, text_attended
from rayapp.vision.methods.cdpruner import conditional_diversity, relevance
from rayapp.vision.methods.dart import least_duplicated
from rayapp.vision.methods.divprune import max_min_distance
from rayapp.vision.methods.pool import TokenPool
from rayapp.vision.methods.ranking import unit_rows
from rayapp.vision.methods.repmax import most_diverse
from rayapp.vision.methods.uniform import at_random, downsampled, uniform_grid
from rayapp.vision.selection import METHODS
from rayapp.vision.tokens import select_visual_tokens

TIE = 2.0**-31


def make_pool(
    seed: int = 0, rows: int = 6, columns: int = 7, num_text: int = 5, hidden: int = 12
) -> TokenPool:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    num_tokens = rows * columns
    return TokenPool(
        visual_ND=draw(num_tokens, hidden),
        text_MD=draw(num_text, hidden),
        grid=(rows, columns),
        seed=seed,
        cls_attention_N=draw(num_tokens).abs(),
        text_attention_N=draw(num_tokens).abs(),
    )


def first_max(values: torch.Tensor, allowed: list[int]) -> int:
    best = max(float(values[i]) for i in allowed)
    return min(i for i in allowed if float(values[i]) >= best - TIE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_keep", [1, 2, 3, 5, 13, 41, 42, 60])
def test_every_method_keeps_exactly_what_it_may(method: str, num_keep: int) -> None:
    for seed in range(3):
        kept = METHODS[method](make_pool(seed), num_keep).tolist()
        assert len(kept) == min(num_keep, 42)
        assert kept == sorted(set(kept))
        assert 0 <= kept[0] <= kept[-1] < 42


@pytest.mark.parametrize("method", METHODS)
def test_every_method_survives_degenerate_tokens(method: str) -> None:
    zeros = torch.zeros(12, 4)
    same = torch.ones(12, 4)
    one = torch.ones(1, 4)
    for visual, text in [(zeros, same), (same, zeros[:0]), (same, same), (one, one)]:
        num_tokens = visual.shape[0]
        scores = torch.zeros(num_tokens)
        pool = TokenPool(visual, text, (1, num_tokens), 7, scores, scores)
        kept = METHODS[method](pool, 5).tolist()
        assert kept == sorted(set(kept))
        assert len(kept) == min(5, num_tokens)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("random", "grid", "downsampling")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_as_the_same_values_in_double(
    method: str, dtype: torch.dtype
) -> None:
    whole = make_pool(4)
    half = [t.to(dtype) for t in (whole.visual_ND, whole.text_MD)]
    scores = whole.cls_attention_N, whole.text_attention_N
    pools = [TokenPool(v, t, whole.grid, 4, *scores) for v, t in (half, [h.double() for h in half])]
    kept = [METHODS[method](pool, 11).tolist() for pool in pools]
    assert kept[0] == kept[1]


def test_alignment_ranks_as_the_mean_squared_distance() -> None:
    pool = make_pool(1)
    distances = torch.cdist(pool.visual_ND.double(), pool.text_MD.double()).square().mean(dim=1)
    expected = sorted(distances.argsort()[:9].tolist())
    assert most_aligned(pool, 9).tolist() == expected
    order = alignment_scores(pool.visual_ND, pool.text_MD).argsort(descending=True)
    assert order.tolist() == distances.argsort().tolist()


def test_diversity_is_the_second_stage_alone() -> None:
    pool = make_pool(2)
    expected = select_visual_tokens(pool.visual_ND, pool.text_MD, num_aligned=42, num_keep=9)
    assert most_diverse(pool, 9).tolist() == expected.tolist()


def brute_max_min(pool: TokenPool, num_keep: int) -> list[int]:
    units = unit_rows(pool.visual_ND)
    distance = 1.0 - units @ units.T
    everyone = list(range(len(distance)))
    others = distance + torch.diag(torch.full((len(distance),), 9.0))
    chosen = [first_max(others.min(dim=1).values, everyone)]
    while len(chosen) < num_keep:
        left = [i for i in everyone if i not in chosen]
        chosen.append(first_max(distance[:, chosen].min(dim=1).values, left))
    return sorted(chosen)


def brute_determinant(pool: TokenPool, num_keep: int) -> list[int]:
    units = unit_rows(pool.visual_ND)
    weight = relevance(units, pool.text_MD)
    kernel = weight[:, None] * (units @ units.T) * weight[None, :]
    chosen: list[int] = []
    while len(chosen) < num_keep:
        before = float(torch.linalg.det(kernel[chosen][:, chosen])) if chosen else 1.0
        gains = torch.full((len(kernel),), -1.0, dtype=torch.float64)
        for i in range(len(kernel)):
            if i not in chosen:
                both = [*chosen, i]
                gains[i] = torch.linalg.det(kernel[both][:, both]) / before
        chosen.append(first_max(gains, [i for i in range(len(kernel)) if i not in chosen]))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("method", "brute"),
    [(max_min_distance, brute_max_min), (conditional_diversity, brute_determinant)],
)
def test_greedy_methods_equal_brute_force(
    method: Callable[..., torch.Tensor], brute: Callable[..., list[int]], seed: int
) -> None:
    for num_keep in (1, 2, 8):
        pool = make_pool(seed, hidden=16)
        assert method(pool, num_keep).tolist() == brute(pool, num_keep)


def test_max_min_ties_and_strips_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    corners = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    pool = TokenPool(corners.float(), torch.zeros(0, 3), (2, 3))
    assert max_min_distance(pool, 3).tolist() == brute_max_min(pool, 3)
    monkeypatch.setattr("rayapp.vision.methods.divprune._STRIP", 4)
    assert max_min_distance(make_pool(3), 9).tolist() == brute_max_min(make_pool(3), 9)


def test_conditional_diversity_prefers_what_the_text_is_about() -> None:
    text = torch.tensor([[1.0, 0.0, 0.0]])
    visual = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    pool = TokenPool(visual, text, (2, 2))
    assert conditional_diversity(pool, 1).tolist() == [1]
    # Beyond three dimensions no token adds volume: the most relevant of the rest is taken.
    doubled = TokenPool(visual.repeat(2, 1), text, (2, 4))
    assert {1, 5} <= set(conditional_diversity(doubled, 4).tolist())


def test_dart_keeps_its_pivots_and_what_is_least_like_them() -> None:
    pool = make_pool(6, num_text=0)
    norms = pool.visual_ND.double().norm(dim=1)
    pivots = sorted(norms.argsort(descending=True)[:4].tolist())
    assert least_duplicated(pool, 3).tolist() == sorted(norms.argsort(descending=True)[:3].tolist())
    units = unit_rows(pool.visual_ND)
    kept = set(pivots)
    for number, pivot in enumerate(pivots):  # 6 more for 4 pivots: 2, 2, 1, 1
        left = [i for i in range(42) if i not in kept]
        unlike = sorted(left, key=lambda i: (float(units[i] @ units[pivot]), i))
        kept |= set(unlike[: 2 if number < 2 else 1])
    assert least_duplicated(pool, 10).tolist() == sorted(kept)


def test_attention_methods_take_the_highest_scores() -> None:
    pool = make_pool(8)
    scores = torch.zeros(42)
    scores[[3, 40, 7]] = torch.tensor([1.0, 2.0, 1.0])
    by_cls = TokenPool(pool.visual_ND, pool.text_MD, pool.grid, 0, scores)
    assert cls_attended(by_cls, 4).tolist() == [0, 3, 7, 40]
    by_text = TokenPool(pool.visual_ND, pool.text_MD, pool.grid, 0, None, scores)
    assert text_attended(by_text, 2).tolist() == [3, 40]
    with pytest.raises(IntegrityError, match="cls_attention_N"):
        cls_attended(by_text, 2)


def test_random_choice_depends_on_the_image_alone() -> None:
    first, again, other = make_pool(1), make_pool(1), make_pool(2)
    assert at_random(first, 9).tolist() == at_random(again, 9).tolist()
    assert at_random(first, 9).tolist() != at_random(other, 9).tolist()
    counts = torch.zeros(42)
    for seed in range(400):
        counts[at_random(TokenPool(first.visual_ND, first.text_MD, (6, 7), seed), 21)] += 1
    assert counts.min() > 150  # each token is kept about 200 times
    assert counts.max() < 250


def test_a_grid_spreads_over_both_axes() -> None:
    pool = make_pool(rows=24, columns=24)
    kept = uniform_grid(pool, 64)
    rows, columns = (kept // 24).unique(), (kept % 24).unique()
    assert rows.tolist() == columns.tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert uniform_grid(make_pool(rows=1, columns=42), 6).tolist() == [3, 10, 17, 24, 31, 38]
    wide = uniform_grid(make_pool(rows=2, columns=21), 30)
    assert [int((wide // 21 == row).sum()) for row in range(2)] == [15, 15]


def test_downsampling_takes_even_steps_in_reading_order() -> None:
    assert downsampled(make_pool(), 6).tolist() == [3, 10, 17, 24, 31, 38]
    assert downsampled(make_pool(), 42).tolist() == list(range(42))


def test_a_pool_holds_only_what_belongs_together() -> None:
    visual = torch.randn(6, 4)
    with pytest.raises(IntegrityError, match="2 x 4"):
        TokenPool(visual, visual, (2, 4))
    with pytest.raises(IntegrityError, match="cls_attention_N"):
        TokenPool(visual, visual, (2, 3), 0, torch.zeros(7))
