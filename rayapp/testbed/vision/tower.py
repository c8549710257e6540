"""Pretraining of the vision tower and the projector: every patch predicts its own labels.

A visual token, as the projector gives it, is read like a hidden state of the language model: its
product with a table of words is to be large for the words of the patch, colour and shape alike (and
a word of its own where a thing has its middle, by which things can be counted), or for the word of
no thing. With word targets the table is the language model's own, which aligns pictures with words
as training on captions does in LLaVA; without, it is a table of its own that is thrown away, so
that no visual token resembles a word. Other heads are thrown away as well: those for size, middle
and the way to it, one by which the CLS token predicts the colours and shapes of a scene, and one
for the counts of visual tokens (:mod:`rayapp.testbed.vision.losses`).

Shapes: B = scenes, N = patches, D = hidden size, V = words, W = words of colours and shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from rayapp.testbed.vision.model import Shape
from rayapp.testbed.vision.questions.patches import GRID, PatchLabels, label_patches
from rayapp.testbed.vision.questions.words import CENTRE, IDS, NOTHING, VOCABULARY
from rayapp.testbed.vision.scenes.picture import draw_picture
from rayapp.testbed.vision.scenes.scenes import COLOURS, SHAPES, Scene

_LOOKS = tuple(IDS[word] for word in (*COLOURS, *SHAPES))
_MIDDLE_WEIGHT = 2.0
_GEOMETRY_WEIGHT = 6.0

Heads = dict[str, torch.Tensor]


def new_heads(shape: Shape, seed: int) -> Heads:
    """The throw-away weights: ``table`` of words, ``patch`` heads and ``scene`` head.

    The patch heads keep their small first weights, so that visual tokens must carry size and middle
    as strongly as words. Heads that learn would grow instead, and the language model, which does
    not have them, would hardly notice size and middle.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    sizes = {
        "table": (len(VOCABULARY), shape.hidden),
        "patch": (6, shape.hidden),
        "patch_bias": (6,),
        "scene": (len(_LOOKS), shape.tower_hidden),
        "scene_bias": (len(_LOOKS),),
        "count": (1 + len(_LOOKS), shape.hidden),
        "count_bias": (1 + len(_LOOKS),),
    }
    heads = {name: torch.zeros(size) for name, size in sizes.items()}
    heads["table"].normal_(std=0.25, generator=generator)
    heads["patch"].normal_(std=0.03, generator=generator)
    heads["patch"][5] *= 3
    heads["scene"].normal_(std=0.03, generator=generator)
    heads["count"].normal_(std=0.03, generator=generator)
    heads["patch_bias"][5] = -3.0
    return {name: head.requires_grad_(name != "patch") for name, head in heads.items()}


def pixels_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """The pictures of scenes as the image processor gives them, ``(B, 3, S, S)``, -1 to 1."""
    pictures = torch.from_numpy(np.stack([draw_picture(scene) for scene in scenes]))
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def stack_labels(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """The labels of the scenes' patches, ``(B, N, ...)``, by their names in ``PatchLabels``."""
    labels = [label_patches(scene) for scene in scenes]
    return {
        name: torch.from_numpy(np.stack([getattr(patches, name) for patches in labels]))
        for name in PatchLabels.__slots__
    }


def running_counts(labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Numbers of things with their middle up to a patch, ``(B, N, 1 + W)``: all, then by look."""
    looks_W = torch.tensor(_LOOKS)
    words_BN2 = torch.stack([labels["colours_N"], labels["shapes_N"]], dim=-1)
    shows_BNW = (words_BN2[..., None] == looks_W).any(dim=2).float()
    middles_BN1 = (labels["middles_N"] > 0).float()[..., None]
    return (middles_BN1 * torch.cat([torch.ones_like(middles_BN1), shows_BNW], -1)).cumsum(dim=1)


def cut_windows(grid_BN: torch.Tensor, shift: tuple[int, int]) -> torch.Tensor:
    """The four quarters of every scene, after its patches moved round by ``shift``.

    Args:
        grid_BN: A value of every patch, ``(B, N, ...)``.
        shift: Number of patches up and to the left; those that leave on one side return on the
            other.

    Returns:
        ``(4 B, N / 4, ...)``, the windows of a scene one after the other.
    """
    rest, half = grid_BN.shape[2:], GRID // 2
    moved = grid_BN.unflatten(1, (GRID, GRID)).roll((-shift[0], -shift[1]), (1, 2))
    windows = moved.reshape(-1, 2, half, 2, half, *rest).transpose(2, 3)
    return windows.reshape(-1, half * half, *rest)


def visual_features(
    model: LlavaForConditionalGeneration,
    pixels: torch.Tensor,
    shift: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The tower's last layer but one, CLS token first, ``(B, 1 + N, tower width)``.

    With ``shift`` the features are those of windows as ``cut_windows`` cuts them, ``(4 B, 1 + N /
    4, tower width)``: patches keep the position embeddings that they have in the whole scene.
    """
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    if shift is not None:
        first = hidden[:, :1].repeat_interleave(4, dim=0)
        hidden = torch.cat([first, cut_windows(hidden[:, 1:], shift)], dim=1)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden


def visual_tokens(model: LlavaForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    """Visual tokens ``(B, N, D)`` from ``visual_features``."""
    return model.model.multi_modal_projector(features[:, 1:])


@dataclass(frozen=True, slots=True)
class TowerReading:
    """A loss, and the shares of patches that were read right."""

    loss: torch.Tensor
    shares: dict[str, float]


def patch_loss(
    visual_BND: torch.Tensor, table_VD: torch.Tensor, heads: Heads, labels: dict[str, torch.Tensor]
) -> TowerReading:
    """The loss of visual tokens against the labels of their patches."""
    colours_BN, shapes_BN = labels["colours_N"], labels["shapes_N"]
    counted_BN = labels["weights_N"] > 0
    nothing_BN = colours_BN == IDS[NOTHING]
    shown_BN, empty_BN = counted_BN & ~nothing_BN, counted_BN & nothing_BN
    words_BNV = functional.log_softmax(functional.linear(visual_BND, table_VD), dim=-1)
    pairs_BN2 = words_BNV.gather(-1, torch.stack([colours_BN, shapes_BN], dim=-1))
    central_BN = torch.where(labels["middles_N"] > 0, words_BNV[..., IDS[CENTRE]], 0.0)
    words_BN = -(pairs_BN2.sum(dim=-1) + central_BN) / (2 + labels["middles_N"])
    read_BN6 = functional.linear(visual_BND, heads["patch"], heads["patch_bias"])
    geometry = functional.smooth_l1_loss(
        read_BN6[..., :5][shown_BN], labels["geometry_N5"][shown_BN], beta=0.1
    )
    middles = functional.binary_cross_entropy_with_logits(
        read_BN6[..., 5], labels["middles_N"], pos_weight=torch.tensor(_MIDDLE_WEIGHT)
    )
    words = words_BN[shown_BN].mean() + 0.5 * words_BN[empty_BN].mean()
    loss = words + _GEOMETRY_WEIGHT * geometry + 2 * middles
    return TowerReading(loss, _shares(words_BNV, read_BN6, labels, shown_BN, empty_BN))


@torch.no_grad()
def _shares(
    words_BNV: torch.Tensor,
    read_BN6: torch.Tensor,
    labels: dict[str, torch.Tensor],
    shown_BN: torch.Tensor,
    empty_BN: torch.Tensor,
) -> dict[str, float]:
    num_colours = len(COLOURS)
    looks_BNW = words_BNV[..., list(_LOOKS)]
    colours_BN = looks_BNW[..., :num_colours].argmax(-1) + _LOOKS[0]
    shapes_BN = looks_BNW[..., num_colours:].argmax(-1) + _LOOKS[num_colours]
    middles_BN = labels["middles_N"] > 0
    off_BN5 = (read_BN6[..., :5] - labels["geometry_N5"]).abs()
    shares = {
        "colour": (colours_BN == labels["colours_N"])[shown_BN],
        "shape": (shapes_BN == labels["shapes_N"])[shown_BN],
        "nothing": (words_BNV.argmax(-1) == IDS[NOTHING])[empty_BN],
        "size_off": off_BN5[..., 0][shown_BN],
        "way_off": off_BN5[..., 1:3][shown_BN],
        "place_off": off_BN5[..., 3:][shown_BN],
        "middle": (read_BN6[..., 5] > 0)[middles_BN],
        "no_middle": (read_BN6[..., 5] <= 0)[shown_BN & ~middles_BN],
    }
    return {name: value.float().mean().item() for name, value in shares.items()}


def scene_loss(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    heads: Heads,
    labels: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The loss of the CLS token, after the last layer, against the looks in a scene."""
    tower = model.model.vision_tower
    last = tower.encoder.layers[-1](features, None)
    pooled = tower.post_layernorm(last[:, 0])
    looks_W = torch.tensor(_LOOKS)
    words_B2N = torch.stack([labels["colours_N"], labels["shapes_N"]], dim=1)
    held_BW = (words_B2N.flatten(1)[:, :, None] == looks_W).any(dim=1).float()
    told_BW = functional.linear(pooled, heads["scene"], heads["scene_bias"])
    return functional.binary_cross_entropy_with_logits(told_BW, held_BW)
