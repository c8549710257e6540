"""Several images or prompts at once: what each of them gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayapp.errors import PlanError
from rayapp.plan import VisualTokens
from rayapp.vision.layout import ImageLayout, PoolLayout
from rayapp.vision.selection import METHODS, EncodedImage, keep_places, keep_places_of_prompts

KINDS = ("llava", "llava_next")
PLACE = 290
SHAPES = [(20, 20), (40, 16), (16, 50), (13, 31)]
ALONE = sorted(set(METHODS) - {"fastv"})

Make = Callable[..., Any]


@pytest.mark.parametrize("kind", KINDS)
def test_images_encoded_together_are_those_encoded_alone(
    kind: str, llava: Make, adapter: Make, picture: Make
) -> None:
    ours = adapter(llava(kind))
    pictures = [picture(number, *size) for number, size in enumerate(SHAPES)]
    together = ours.encode_prepared(ours.prepare(pictures), cls_attention=True)
    for image, found in zip(pictures, together, strict=True):
        alone = ours.encode(image, cls_attention=True)
        assert (found.layout, found.digest) == (alone.layout, alone.digest)
        torch.testing.assert_close(found.features_ND, alone.features_ND)
        torch.testing.assert_close(found.cls_attention_N, alone.cls_attention_N)


def make_image(seed: int, *, tiles: bool = False) -> EncodedImage:
    pools = (PoolLayout(0, 6, 6), *([PoolLayout(36, 4, 5, has_newlines=True)] if tiles else []))
    layout = ImageLayout(pools)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(layout.num_tokens, 8, generator=generator)
    return EncodedImage(features, layout, f"{seed:064x}", torch.rand(layout.num_tokens))


@pytest.mark.parametrize("method", ALONE)
@pytest.mark.parametrize("tiles", [(), (1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("num_keep", [1, 7, 0.5, 1.0, 99])
def test_prompts_chosen_together_keep_what_each_keeps_alone(
    method: str, tiles: tuple[int, ...], num_keep: float
) -> None:
    images = [make_image(seed, tiles=seed in tiles) for seed in range(4)]
    prompts = [[images[0]], [images[1], images[2]], [images[3]]]
    texts = [torch.randn(size, 8) for size in (5, 0, 2)]
    for sharing in ("equal", "diversity"):
        rule = VisualTokens(method=method, num_keep=num_keep, sharing=sharing)
        found = keep_places_of_prompts(rule, prompts, texts)
        for prompt, text, places in zip(prompts, texts, found, strict=True):
            alone = keep_places(rule, prompt, text)
            assert [p.tolist() for p in places] == [p.tolist() for p in alone]


def test_the_aligned_of_prompts_chosen_together() -> None:
    prompts = [[make_image(seed)] for seed in range(3)]
    texts = [torch.randn(3, 8) for _ in prompts]
    for num_aligned in (6, 20, 0.4):
        rule = VisualTokens(num_aligned=num_aligned, num_keep=6)
        found = keep_places_of_prompts(rule, prompts, texts)
        assert [kept.tolist() for (kept,) in found] == [
            keep_places(rule, prompt, text)[0].tolist()
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    with pytest.raises(PlanError, match="num_aligned=3"):
        keep_places_of_prompts(VisualTokens(num_aligned=3, num_keep=6), prompts, texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [None, VisualTokens(num_keep=5, positions="compact")])
def test_prompts_embedded_together_are_those_embedded_alone(
    kind: str, rule: VisualTokens | None, llava: Make, adapter: Make, picture: Make
) -> None:
    ours = adapter(llava(kind))
    images = [ours.encode(picture(number, *size)) for number, size in enumerate(SHAPES[:3])]
    prompts = [(1, PLACE, 2), (PLACE, 3, PLACE, 4)]
    each, texts = [images[:1], images[1:]], [(2, 5), ()]
    together = ours.embed_prompts(prompts, each, rule, texts=texts)
    for found, prompt, shown, text in zip(together, prompts, each, texts, strict=True):
        alone = ours.embed_prompt(prompt, shown, rule, text_token_ids=text)
        assert torch.equal(found.hidden_TE, alone.hidden_TE)
        assert torch.equal(found.positions_T, alone.positions_T)
        assert (found.next_position, found.image_spans) == (alone.next_position, alone.image_spans)


def test_fastv_takes_prompts_one_by_one(llava: Make, adapter: Make, picture: Make) -> None:
    ours = adapter(llava("llava"))
    image = ours.encode(picture(0))
    with pytest.raises(PlanError, match="one by one"):
        ours.embed_prompts(
            [(PLACE, 1)], [[image]], VisualTokens(method="fastv", num_keep=2), texts=[()]
        )
