"""A plan's rule becomes places: per view by token share, per image equal or by diversity."""

from __future__ import annotations

import pytest
import torch

from rayapp.errors import PlanError
from rayapp.plan import VisualTokens
from rayapp.vision.layout import ImageLayout, PoolLayout
from rayapp.vision.selection import METHODS, EncodedImage, keep_places
from rayapp.vision.tokens import select_visual_tokens

TEXT = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))


def make_image(seed: int, *, tiles: bool = False) -> EncodedImage:
    pools = [PoolLayout(0, 4, 4)]
    if tiles:
        pools.append(PoolLayout(16, 6, 8, has_newlines=True))
    layout = ImageLayout(tuple(pools))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(layout.num_tokens, 8, generator=generator)
    return EncodedImage(features, layout, f"{seed:064x}", torch.rand(layout.num_tokens))


def test_one_view_is_the_plain_selection() -> None:
    image = make_image(0)
    rule = VisualTokens(num_aligned=10, num_keep=5)
    expected = select_visual_tokens(image.features_ND, TEXT, num_aligned=10, num_keep=5)
    assert keep_places(rule, [image], TEXT)[0].tolist() == expected.tolist()


def test_views_share_a_budget_by_their_tokens_and_newlines_are_free() -> None:
    image = make_image(1, tiles=True)
    (kept,) = keep_places(VisualTokens(num_keep=16), [image], TEXT)
    newlines = {16 + row * 9 + 8 for row in range(6)}
    tokens = [place for place in kept.tolist() if place not in newlines]
    assert sum(place < 16 for place in tokens) == 4  # 16 of 64 tokens lie in the base view
    assert sum(place >= 16 for place in tokens) == 12
    rows = {(place - 16) // 9 for place in tokens if place >= 16}
    assert newlines & set(kept.tolist()) == {16 + row * 9 + 8 for row in rows}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tiles", [False, True])
def test_every_method_keeps_all_where_the_budget_allows(method: str, tiles: bool) -> None:
    image = make_image(2, tiles=tiles)
    attention = [torch.rand(image.num_tokens)]
    for amount in (1.0, 10_000):
        rule = VisualTokens(method=method, num_keep=amount)
        (kept,) = keep_places(rule, [image], TEXT, text_attention=attention)
        assert kept.tolist() == list(range(image.num_tokens))


@pytest.mark.parametrize("num_keep", range(1, 64))
def test_rounding_never_leaves_a_view_short_of_aligned_tokens(num_keep: int) -> None:
    image = make_image(3, tiles=True)
    (kept,) = keep_places(VisualTokens(num_aligned=num_keep, num_keep=num_keep), [image], TEXT)
    newlines = sum((place - 16) % 9 == 8 for place in kept.tolist() if place >= 16)
    assert len(kept) - newlines == num_keep


def test_images_are_chosen_separately() -> None:
    images = [make_image(4), make_image(5)]
    rule = VisualTokens(num_keep=6)
    both = keep_places(rule, images, TEXT)
    alone = [keep_places(rule, [image], TEXT)[0] for image in images]
    assert [b.tolist() for b in both] == [a.tolist() for a in alone]


def test_sharing_by_diversity_moves_tokens_to_the_richer_image() -> None:
    rich = make_image(6)
    plain = EncodedImage(torch.ones(16, 8), rich.layout, "0" * 64)
    rule = VisualTokens(num_aligned=6, num_keep=6, sharing="diversity")
    kept = keep_places(rule, [plain, rich], TEXT)
    sizes = [len(k) for k in kept]
    assert sum(sizes) == 12
    assert sizes[1] > 6  # more than the rule's own num_aligned, which grows with it
    assert sizes[0] >= 1


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (VisualTokens(method="magic", num_keep=4), "'magic' is not known"),
        (VisualTokens(method="random", num_keep=4, num_aligned=8), "means nothing to method"),
        (VisualTokens(num_keep=8, num_aligned=4), "num_aligned=4"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(rule: VisualTokens, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        keep_places(rule, [make_image(7)], TEXT)
