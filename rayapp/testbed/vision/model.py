"""The model: an ordinary ``LlavaForConditionalGeneration``, small, and its first weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from rayapp.testbed.vision.questions.patches import GRID, NUM_PATCHES
from rayapp.testbed.vision.questions.words import END_ID, IMAGE_ID, PAD_ID, VOCABULARY
from rayapp.testbed.vision.scenes.scenes import PATCH, SIDE

_NEAR = ((1.0, 1.5), (1.5, 1.0), (2.0, 0.5))
"""Distance in patches that the heads of every tower layer look at first, and their sharpness."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; ``tower_*`` are the vision tower's.

    As in LLaVA-1.5, visual tokens are the tower's last layer but one without its CLS token.
    """

    tower_layers: int = 4
    tower_hidden: int = 64
    tower_heads: int = 4
    tower_mlp: int = 192
    num_blocks: int = 6
    hidden: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 256
    max_positions: int = 1024

    def config(self) -> LlavaConfig:
        """The configuration of the model."""
        vision = CLIPVisionConfig(
            hidden_size=self.tower_hidden,
            intermediate_size=self.tower_mlp,
            num_hidden_layers=self.tower_layers,
            num_attention_heads=self.tower_heads,
            image_size=SIDE,
            patch_size=PATCH,
        )
        text = LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.num_blocks,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_positions,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END_ID,
            pad_token_id=PAD_ID,
        )
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_ID,
            image_seq_length=NUM_PATCHES,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )


def _waves(num_waves: int) -> torch.Tensor:
    """Sines and cosines of a patch's column, then of its row, ``(N, 4 * num_waves)``."""
    places_G = torch.arange(GRID, dtype=torch.float32)
    angles_GW = places_G[:, None] * _turns(num_waves)
    waves_GW = torch.cat([angles_GW.sin(), angles_GW.cos()], dim=1)
    columns_N = waves_GW.repeat(GRID, 1)
    rows_N = waves_GW.repeat_interleave(GRID, dim=0)
    return torch.cat([columns_N, rows_N], dim=1)


def _turns(num_waves: int) -> torch.Tensor:
    """Radians per patch of every wave, ``(num_waves,)``; they are 4.5 to 20 patches long."""
    return 2 * torch.pi / (4.5 * (20 / 4.5) ** torch.linspace(0, 1, num_waves))


def _look_at(attention: Any, reach: float, sharpness: float) -> None:
    """Let every head of a tower layer look at the patch ``reach`` away in its own direction.

    Keys are the waves of a patch and queries are the waves of the place looked at, so their product
    is greatest there.
    """
    heads, head_dim = attention.num_heads, attention.head_dim
    turns_W = _turns(head_dim // 4)
    query, key = attention.q_proj.weight.zero_(), attention.k_proj.weight.zero_()
    scale = (sharpness * head_dim**0.5) ** 0.5
    for head in range(heads):
        direction = 2 * torch.pi * (head + 0.5) / heads
        rows = slice(head * head_dim, (head + 1) * head_dim)
        away = reach * math.cos(direction), reach * math.sin(direction)
        query[rows, :head_dim] = scale * _shifted(turns_W, away)
        key[rows, :head_dim] = scale * torch.eye(head_dim)


def _shifted(turns_W: torch.Tensor, away: tuple[float, float]) -> torch.Tensor:
    """The matrix that takes the waves of a place to those of the place ``away`` from it."""
    parts = []
    for distance in away:
        sine, cosine = (
            torch.diag((turns_W * distance).sin()),
            torch.diag((turns_W * distance).cos()),
        )
        parts.append(torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)]))
    return torch.block_diag(*parts)


@torch.no_grad()
def new_model(shape: Shape, seed: int) -> LlavaForConditionalGeneration:
    """A model before training, fp32; equal seeds give equal weights.

    Output projections of blocks are zero, norms one, everything else is scaled by its inputs. The
    tower starts with a sense of place (as ConViT, arXiv:2103.10697, does): its position embeddings
    are waves over the grid, and the heads of its first layers look at patches nearby, one direction
    each, so that it need not learn which patches touch.
    """
    model = LlavaForConditionalGeneration(shape.config()).float()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(float(name.endswith("weight")))
        elif name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            weight.zero_()
        elif name.endswith("embed_tokens.weight"):
            weight.normal_(std=0.25, generator=generator)
        else:
            fan_in = weight[0].numel()
            weight.normal_(std=0.5 / fan_in**0.5, generator=generator)
    model.model.language_model.norm.weight.fill_(0.3)
    embeddings = model.model.vision_tower.embeddings
    embeddings.class_embedding.normal_(std=0.5, generator=generator)
    embeddings.patch_embedding.weight.mul_(2)
    width = shape.tower_hidden // shape.tower_heads
    embeddings.patch_embedding.weight[:width] = 0
    embeddings.position_embedding.weight[1:] *= 0.1
    embeddings.position_embedding.weight[1:, :width] = 0.7 * _waves(width // 4)
    layers = model.model.vision_tower.encoder.layers[:-1]
    for layer, (reach, sharpness) in zip(layers, _NEAR, strict=False):
        _look_at(layer.self_attn, reach, sharpness)
    return model
