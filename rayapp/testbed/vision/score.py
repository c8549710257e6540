"""Exact match per type of question: the share of answers that greedy decoding gets right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlavaForConditionalGeneration

from rayapp.errors import InputError
from rayapp.testbed.vision.packing import Packed, pack, run_packed
from rayapp.testbed.vision.questions.questions import TYPES, Question, one_of_each
from rayapp.testbed.vision.scenes.scenes import Scene, draw_scene
from rayapp.testbed.vision.tower import pixels_of, visual_features, visual_tokens

_TOKENS = 64
"""Number of tokens that one question of every type needs, with its answer."""

_GROUP = 8


@dataclass(frozen=True, slots=True)
class AskedScene:
    """A scene and one question of every type, in the order of ``TYPES``."""

    scene: Scene
    questions: tuple[Question, ...]


def draw_asked_scenes(split: str, count: int, seed: int) -> list[AskedScene]:
    """Draw scenes that allow every type of question; they are the same on every machine.

    Scene ``i`` depends on the arguments and ``i`` alone, so a smaller ``count`` gives a prefix.

    Args:
        split: One of ``rayapp.testbed.tasks.SPLITS``.
        count: Number of scenes to draw.
        seed: Seed of the draw; other seeds give other scenes of the same split.
    """
    return [_draw_asked_scene(split, seed, index) for index in range(count)]


def _draw_asked_scene(split: str, seed: int, index: int) -> AskedScene:
    rng = random.Random(f"rayapp.testbed.vision/{split}/{seed}/{index}")
    while True:
        scene = draw_scene(rng, split)
        questions = one_of_each(rng, scene)
        if questions is not None:
            return AskedScene(scene, tuple(questions))


@torch.inference_mode()
def _right(model: LlavaForConditionalGeneration, scenes: Sequence[AskedScene]) -> torch.Tensor:
    """Whether every answer and its end marker are the best tokens, ``(B, types)``."""
    packed = pack([entry.questions for entry in scenes], _TOKENS)
    pixels = pixels_of([entry.scene for entry in scenes]).to(model.dtype)
    visual_BND = visual_tokens(model, visual_features(model, pixels))
    best_K = run_packed(model, visual_BND, packed).logits_KV.argmax(-1)
    return _by_question(best_K, packed)


def _by_question(best_K: torch.Tensor, packed: Packed) -> torch.Tensor:
    targets_K = packed.targets_BQ[packed.kinds_BQ > 0]
    return (best_K == targets_K).view(len(packed.ids_BQ), len(TYPES), 2).all(dim=-1)


def score(model: LlavaForConditionalGeneration, asked: Sequence[AskedScene]) -> dict[str, float]:
    """Greedy exact match of one question of every type per scene, end marker included.

    One pass over packed questions suffices, because their logits are those of single prompts: an
    answer is one token, so greedy decoding is right exactly if the best token is the right one
    twice.

    Args:
        model: A model prepared by ``attend_packed``; scored in its own dtype.
        asked: The scenes; at least one.

    Returns:
        The share of right answers by type.

    Raises:
        InputError: If there are no scenes.
    """
    if not asked:
        raise InputError("asked=[] leaves nothing to score; pass at least one scene")
    right = torch.cat(
        [_right(model, asked[start : start + _GROUP]) for start in range(0, len(asked), _GROUP)]
    )
    return dict(zip(TYPES, right.double().mean(dim=0).tolist(), strict=True))
