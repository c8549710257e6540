"""Budgets: the number of visual tokens that an image, or a view of an image, may keep.

TrimTokenator-LC (arXiv:2512.22748) measures the diversity within an image (mean cosine distance of
its tokens) and the variation across images, and lets both guide an image's budget. The combination
of the two, and the measure of variation by mean tokens, are project defaults: an image's weight is
its number of tokens x (diversity + variation). Tokens are then selected image by image; the paper's
second stage, a selection across images, is left out.
Shapes: N = tokens of an image, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from rayapp.errors import PlanError
from rayapp.plan import resolve
from rayapp.vision.methods.ranking import fixed_point, unit_rows


def largest_remainder(
    weights: Sequence[float | Fraction], total: int, limits: Sequence[int]
) -> list[int]:
    """Share ``total`` in proportion to ``weights``, in whole numbers, none above its limit.

    The surplus above a limit is shared among the others. The remainders go to the largest
    fractions, ties to the lowest index. If all weights are zero, they count as equal. The sum of
    the result is ``min(total, sum(limits))``.
    """
    left = min(total, sum(limits))
    exact = [Fraction(weight) for weight in weights]
    shares = [0] * len(limits)
    open_ = [index for index, limit in enumerate(limits) if limit]
    while open_ and left:
        mass = sum(exact[index] for index in open_)
        quota = {i: left * exact[i] / mass if mass else Fraction(left, len(open_)) for i in open_}
        full = [index for index in open_ if quota[index] >= limits[index]]
        if not full:
            return _rounded(shares, quota, left)
        for index in full:
            shares[index] = limits[index]
        left -= sum(limits[index] for index in full)
        open_ = [index for index in open_ if index not in full]
    return shares


def _rounded(shares: list[int], quota: dict[int, Fraction], total: int) -> list[int]:
    """Add the quotas to ``shares``, rounded so that the sum is ``total``."""
    floors = {index: int(part) for index, part in quota.items()}
    surplus = total - sum(floors.values())
    by_fraction = sorted(quota, key=lambda index: (floors[index] - quota[index], index))
    for index, floor in floors.items():
        shares[index] += floor + (index in by_fraction[:surplus])
    return shares


def image_budgets(
    num_keep: int | float, sizes: Sequence[int], weights: Sequence[float] | None = None
) -> list[int]:
    """Numbers of tokens that the images keep.

    Args:
        num_keep: Count or share of tokens per image.
        sizes: Number of visual tokens of every image.
        weights: None gives every image its own count or share of its tokens. Otherwise the same
            total is shared in proportion to the weights, with at least one token per image.

    Raises:
        PlanError: An image would keep no token.
    """
    own = [resolve(num_keep, size) for size in sizes]
    if not all(own):
        raise PlanError(f"num_keep={num_keep} keeps no visual token; keep at least 1")
    if weights is None:
        return own
    extra = largest_remainder(weights, sum(own) - len(own), [size - 1 for size in sizes])
    return [1 + more for more in extra]


def diversity_weights(images: Sequence[torch.Tensor]) -> list[float]:
    """Weights of images ``(N, D)`` by diversity within and variation across them; higher = more.

    Both lie between 0 and 2. One image has no variation.
    """
    units = [unit_rows(image_ND) for image_ND in images]
    means = unit_rows(torch.stack([unit_ND.mean(dim=0) for unit_ND in units]))
    weights = []
    for number, unit_ND in enumerate(units):
        others = [other for other in range(len(units)) if other != number]
        variation = 1.0 - (means[others] @ means[number]).mean() if others else 0.0
        # Weights are rounded, so that equal images weigh the same.
        weight = fixed_point(torch.as_tensor(mean_distance(unit_ND) + variation))
        weights.append(unit_ND.shape[0] * float(weight) / 2.0**32)
    return weights


def mean_distance(units_ND: torch.Tensor) -> float:
    """Mean of 1 - cosine over all pairs of different tokens, in O(N D) without forming pairs."""
    num_tokens = units_ND.shape[0]
    if num_tokens < 2:
        return 0.0
    cosines = units_ND.sum(dim=0).square().sum() - units_ND.square().sum()
    return 1.0 - float(cosines) / (num_tokens * (num_tokens - 1))
