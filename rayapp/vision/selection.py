"""Selection: a plan's rule is applied to the images of a prompt, and gives the places to keep.

Shapes: N = all tokens of an image, newlines included; M = text tokens, D = hidden size, K = kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rayapp.errors import PlanError
from rayapp.plan import VisualTokens
from rayapp.vision.budgets import diversity_weights, image_budgets, largest_remainder
from rayapp.vision.layout import ImageLayout, PoolLayout
from rayapp.vision.methods.alignment import most_aligned
from rayapp.vision.methods.attended import cls_attended, text_attended
from rayapp.vision.methods.cdpruner import conditional_diversity
from rayapp.vision.methods.dart import least_duplicated
from rayapp.vision.methods.divprune import max_min_distance
from rayapp.vision.methods.pool import Selector, TokenPool
from rayapp.vision.methods.repmax import most_diverse
from rayapp.vision.methods.uniform import at_random, downsampled, uniform_grid
from rayapp.vision.tokens import resolve_budget, select_visual_tokens_batch, trimtokenator

METHODS: dict[str, Selector] = {
    "trimtokenator": trimtokenator,
    "alignment": most_aligned,
    "diversity": most_diverse,
    "random": at_random,
    "grid": uniform_grid,
    "downsampling": downsampled,
    "divprune": max_min_distance,
    "cdpruner": conditional_diversity,
    "dart": least_duplicated,
    "cls_attention": cls_attended,
    "fastv": text_attended,
}

# Every step of a search reads these bytes again, so they must fit into a processor's cache (project
# default).
_CACHE_BYTES = 4 * 2**20

# No image has so many tokens: shares and counts that are contradictory here are so for any image.
_MANY_TOKENS = 1 << 20


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image: the output of vision tower and projector, as the cache stores it.

    ``features_ND`` are all its tokens in prompt order, newlines included. ``cls_attention_N`` (0 at
    newlines) is set only if the caller wanted it. ``digest`` names the image's content.
    """

    features_ND: torch.Tensor
    layout: ImageLayout
    digest: str
    cls_attention_N: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the unpruned prompt."""
        return self.layout.num_tokens

    @property
    def nbytes(self) -> int:
        """Number of bytes that it takes in a cache."""
        return sum(t.nbytes for t in (self.features_ND, self.cls_attention_N) if t is not None)

    @property
    def visual_ND(self) -> torch.Tensor:
        """Features without newlines, pool after pool."""
        return torch.cat([pool.tokens(self.features_ND) for pool in self.layout.pools])

    def pools(
        self, text_MD: torch.Tensor, text_attention_N: torch.Tensor | None = None
    ) -> list[TokenPool]:
        """Make the pools that a method chooses from, one per view."""
        return [
            TokenPool(
                visual_ND=pool.tokens(self.features_ND),
                text_MD=text_MD,
                grid=(pool.rows, pool.columns),
                seed=(int(self.digest[:12], 16) + number) % 2**63,
                cls_attention_N=_tokens(pool, self.cls_attention_N),
                text_attention_N=_tokens(pool, text_attention_N),
            )
            for number, pool in enumerate(self.layout.pools)
        ]


def _tokens(pool: PoolLayout, scores_N: torch.Tensor | None) -> torch.Tensor | None:
    return None if scores_N is None else pool.tokens(scores_N)


def check_method(rule: VisualTokens) -> None:
    """Raise :class:`PlanError` for an unknown method, or a number that the method does not use."""
    if rule.method not in METHODS:
        raise PlanError(
            f"visual_tokens.method {rule.method!r} is not known; use one of {', '.join(METHODS)}"
        )
    if rule.num_aligned is not None and rule.method != "trimtokenator":
        raise PlanError(
            f"visual_tokens.num_aligned={rule.num_aligned} means nothing to method "
            f"{rule.method!r}; drop it, or use trimtokenator"
        )


def check_rule(rule: VisualTokens) -> None:
    """Raise :class:`PlanError` if a rule cannot be right for any model."""
    check_method(rule)
    resolve_budget(_MANY_TOKENS, num_aligned=rule.num_aligned, num_keep=rule.num_keep)


def keep_places(
    rule: VisualTokens,
    images: Sequence[EncodedImage],
    text_MD: torch.Tensor,
    *,
    text_attention: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Choose the places that every image keeps, ascending; images and views are chosen separately.

    An image's budget is shared among its views by their number of tokens, with the method of the
    largest remainder.

    Args:
        rule: The method and its numbers, which count per image; ``sharing: diversity`` shares the
            same total among the images by diversity (see :mod:`rayapp.vision.budgets`).
        images: The images in prompt order.
        text_MD: Embeddings of the user's words.
        text_attention: Attention ``(N,)`` of the prompt's last token for every image, for
            ``fastv``.

    Raises:
        PlanError: The method is not known, or its numbers are contradictory.
    """
    check_method(rule)
    sizes = [image.layout.num_visual for image in images]
    by_diversity = rule.sharing == "diversity"
    weights = diversity_weights([image.visual_ND for image in images]) if by_diversity else None
    budgets = image_budgets(rule.num_keep, sizes, weights)
    scores = text_attention if text_attention is not None else [None] * len(images)
    return [
        _keep_of_image(rule, image.layout, image.pools(text_MD, attention_N), budget)
        for image, budget, attention_N in zip(images, budgets, scores, strict=True)
    ]


def keep_places_of_prompts(
    rule: VisualTokens, prompts: Sequence[Sequence[EncodedImage]], texts: Sequence[torch.Tensor]
) -> list[list[torch.Tensor]]:
    """Run :func:`keep_places` for several prompts with their own texts; not for ``fastv``.

    TrimTokenator chooses from images of one shape all at once. On a GPU all such images take part,
    because a step of its search costs launches however many they are; on a CPU as many as fit into
    its cache.
    """
    check_method(rule)
    images = [image for prompt in prompts for image in prompt]
    if not _choosable_at_once(rule, images):
        return [keep_places(rule, *each) for each in zip(prompts, texts, strict=True)]
    visual_BND = torch.stack([image.visual_ND for image in images])
    text_of = [text_MD for prompt, text_MD in zip(prompts, texts, strict=True) for _ in prompt]
    step = _images_at_once(visual_BND)
    chosen = [
        kept_K
        for start in range(0, len(images), step)
        for kept_K in select_visual_tokens_batch(
            visual_BND[start : start + step],
            text_of[start : start + step],
            num_aligned=rule.num_aligned,
            num_keep=rule.num_keep,
        )
    ]
    kept = iter(chosen)
    return [[image.layout.keep([next(kept)]) for image in prompt] for prompt in prompts]


def _images_at_once(visual_BND: torch.Tensor) -> int:
    num_images, num_tokens, width = visual_BND.shape
    if visual_BND.is_cuda:
        return num_images
    return max(1, _CACHE_BYTES // (8 * num_tokens * width))  # The numbers are float64.


def _choosable_at_once(rule: VisualTokens, images: Sequence[EncodedImage]) -> bool:
    layouts = {image.layout for image in images}
    alike = len(layouts) == 1 and len(images[0].layout.pools) == 1
    return alike and rule.method == "trimtokenator" and rule.sharing == "equal"


def _keep_of_image(
    rule: VisualTokens, layout: ImageLayout, pools: Sequence[TokenPool], num_keep: int
) -> torch.Tensor:
    sizes = [pool.num_tokens for pool in pools]
    budgets = largest_remainder(sizes, num_keep, sizes)
    aligned = _aligned(rule, sum(sizes), num_keep)
    per_pool = largest_remainder(sizes, aligned, sizes)
    chosen = []
    for pool, budget, at_first in zip(pools, budgets, per_pool, strict=True):
        select = METHODS[rule.method]
        if rule.method == "trimtokenator":
            # Two remainders may round differently; the second stage must have enough to choose.
            select = partial(trimtokenator, num_aligned=max(at_first, budget))
        device = pool.visual_ND.device
        none = torch.zeros(0, dtype=torch.int64, device=device)
        chosen.append(select(pool, budget) if budget else none)
    return layout.keep(chosen)


def _aligned(rule: VisualTokens, num_tokens: int, num_keep: int) -> int:
    """Number of an image's tokens that survive the alignment stage."""
    if rule.num_aligned is None:
        return resolve_budget(num_tokens, num_aligned=None, num_keep=num_keep)[0]
    # Sharing by diversity may give an image more than the plan's own number.
    own, _ = resolve_budget(num_tokens, num_aligned=rule.num_aligned, num_keep=rule.num_keep)
    return max(own, num_keep)
