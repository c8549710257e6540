"""The loss of a step of either stage, from freshly drawn scenes of the training split."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from rayapp.testbed.tasks import below
from rayapp.testbed.vision.packing import END_KIND, Packed, pack, run_packed
from rayapp.testbed.vision.questions.patches import GRID
from rayapp.testbed.vision.questions.questions import TYPES, draw_questions
from rayapp.testbed.vision.questions.words import IDS, NOTHING
from rayapp.testbed.vision.recipe import Recipe
from rayapp.testbed.vision.scenes.scenes import Scene, draw_scene
from rayapp.testbed.vision.tower import (
    Heads,
    cut_windows,
    patch_loss,
    pixels_of,
    running_counts,
    scene_loss,
    stack_labels,
    visual_features,
    visual_tokens,
)

_MANY = 40
"""A number of questions that no row of tokens has room for."""


@dataclass(slots=True)
class Readings:
    """Means of the values that steps reported, since they were last taken."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, values: Mapping[str, float], count: float = 1.0) -> None:
        """Add values, each the mean of ``count``."""
        for name, value in values.items():
            self.sums[name] += value * count
            self.counts[name] += count

    def take(self) -> dict[str, float]:
        """The means by name; the readings start over."""
        means = {name: round(self.sums[name] / self.counts[name], 4) for name in self.sums}
        self.sums.clear()
        self.counts.clear()
        return means


def draw_scenes(recipe: Recipe, step: int) -> tuple[random.Random, list[Scene]]:
    """The scenes of a step, and the random generator for its other draws."""
    rng = random.Random(f"rayapp.testbed.vision/{recipe.seed}/{step}")
    stage = recipe.stages[recipe.stage_at(step)[0]]
    return rng, [draw_scene(rng, "train") for _ in range(stage.num_scenes)]


def word_table(model: LlavaForConditionalGeneration, heads: Heads, recipe: Recipe) -> torch.Tensor:
    """The word table that patches are read by: the language model's, or a throw-away copy's."""
    own = model.model.language_model.embed_tokens.weight
    return own if recipe.word_targets else heads["table"]


def tower_step_loss(
    model: LlavaForConditionalGeneration, heads: Heads, recipe: Recipe, step: int, seen: Readings
) -> torch.Tensor:
    """The loss of a step of the first stage."""
    rng, scenes = draw_scenes(recipe, step)
    labels = stack_labels(scenes)
    windows = recipe.shows_windows(step)
    shift = (below(rng, GRID), below(rng, GRID)) if windows else None
    if shift:
        labels = {name: cut_windows(label, shift) for name, label in labels.items()}
    with torch.autocast("cpu", torch.bfloat16):
        features = visual_features(model, pixels_of(scenes), shift)
        visual_BND = visual_tokens(model, features).float()
        scene_part = None if windows else scene_loss(model, features, heads, labels)
    read = patch_loss(visual_BND, word_table(model, heads, recipe), heads, labels)
    seen.add({"loss": read.loss.item(), **read.shares})
    return read.loss if scene_part is None else read.loss + scene_part


def draw_kept(rng: random.Random, colours_BN: torch.Tensor, count: int) -> torch.Tensor:
    """The patches ``(B, count)`` that a step shows, ascending.

    Patches of things come first, then any others.
    """
    generator = torch.Generator().manual_seed(below(rng, 2**31))
    chances_BN = torch.rand(colours_BN.shape, generator=generator)
    chances_BN += (colours_BN != IDS[NOTHING]).float()
    return chances_BN.topk(count, dim=1).indices.sort(dim=1).values


def answer_step_loss(
    model: LlavaForConditionalGeneration, heads: Heads, recipe: Recipe, step: int, seen: Readings
) -> torch.Tensor:
    """The loss of a step of the second or third stage."""
    rng, scenes = draw_scenes(recipe, step)
    packed = pack([draw_questions(rng, scene, _MANY) for scene in scenes], recipe.question_tokens)
    labels = stack_labels(scenes)
    kept_BN = draw_kept(rng, labels["colours_N"], recipe.tokens_at(step, rng))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            features = visual_features(model, pixels_of(scenes))
        visual_BND = visual_tokens(model, features).float()
        chosen_BND = visual_BND.take_along_dim(kept_BN[..., None], dim=1)
        output = run_packed(model, chosen_BND, packed, kept_BN)
    read = patch_loss(visual_BND, word_table(model, heads, recipe), heads, labels)
    loss = _answer_loss(output.logits_KV, packed, recipe, seen)
    counted = _count_loss(output.halfway_BND, kept_BN, heads, labels, seen)
    return loss + recipe.patch_weight * read.loss + recipe.count_weight * counted


def _count_loss(
    halfway_BND: torch.Tensor,
    kept_BN: torch.Tensor,
    heads: Heads,
    labels: dict[str, torch.Tensor],
    seen: Readings,
) -> torch.Tensor:
    """The loss of counting: every visual token predicts, half-way through the blocks, its counts.

    The counts say how many things, in all and by look, have their middle in the picture up to this
    token. Answers alone teach counting slowly: a scene has one answer to how many things there are.
    """
    so_far_BNC = running_counts(labels).take_along_dim(kept_BN[..., None], dim=1)
    normed_BND = functional.rms_norm(halfway_BND, halfway_BND.shape[-1:])
    told_BNC = functional.linear(normed_BND, heads["count"], heads["count_bias"])
    seen.add({"count_off": (told_BNC - so_far_BNC).abs().mean().item()})
    return functional.smooth_l1_loss(told_BNC, so_far_BNC, beta=0.25)


def _answer_loss(
    logits_KV: torch.Tensor, packed: Packed, recipe: Recipe, seen: Readings
) -> torch.Tensor:
    """The loss of answers; every type weighs the same, however many of its questions there are."""
    supervised_BQ = packed.kinds_BQ > 0
    kinds_K, targets_K = packed.kinds_BQ[supervised_BQ], packed.targets_BQ[supervised_BQ]
    losses_K = functional.cross_entropy(logits_KV, targets_K, reduction="none")
    right_K = (logits_KV.argmax(-1) == targets_K).float()
    answers, ends = [], losses_K[kinds_K == END_KIND].mean()
    for number, name in enumerate(TYPES, start=1):
        of_kind = kinds_K == number
        if of_kind.any():
            answers.append(losses_K[of_kind].mean())
            seen.add({name: right_K[of_kind].mean().item()}, float(of_kind.sum()))
    nats = torch.stack(answers).mean()
    seen.add({"nats": nats.item(), "end_nats": ends.item()})
    return nats + recipe.end_weight * ends
