"""LLaVA models with random weights: LLaVA-1.5-7B's shapes, and the same at smaller scales.

Every scale sees an image of 336 x 336 pixels as 576 tokens; the tower's penultimate block is read,
as LLaVA-1.5 does, and all its blocks run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

SIDE, PATCH = 336, 14
IMAGE_TOKENS = (SIDE // PATCH) ** 2
IMAGES = (1, 2, 4, 6)
"""Of prompts whose KV is weighed: as many as LLaVA-1.5's context of 4,096 takes."""


@dataclass(frozen=True)
class Shape:
    """Width, blocks, heads and MLP width of a stack of blocks."""

    hidden: int
    blocks: int
    heads: int
    mlp: int


@dataclass(frozen=True)
class Scale:
    """The language model, its vocabulary, and the vision tower."""

    text: Shape
    vocab: int
    vision: Shape


SCALES = {
    "llava-7b": Scale(Shape(4096, 32, 32, 11_008), 32_064, Shape(1024, 24, 16, 4096)),
    "small": Scale(Shape(512, 8, 8, 1376), 2048, Shape(256, 6, 4, 1024)),
    "tiny": Scale(Shape(64, 2, 2, 160), 300, Shape(32, 2, 2, 64)),
}


def random_llava(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    scale = SCALES[name]
    text = LlamaConfig(
        hidden_size=scale.text.hidden,
        num_hidden_layers=scale.text.blocks,
        num_attention_heads=scale.text.heads,
        num_key_value_heads=scale.text.heads,
        intermediate_size=scale.text.mlp,
        vocab_size=scale.vocab,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=scale.vision.hidden,
        num_hidden_layers=scale.vision.blocks,
        num_attention_heads=scale.vision.heads,
        intermediate_size=scale.vision.mlp,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=scale.vocab - 1)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    model.rayapp_fingerprint = "random"  # hashing gigabytes of noise would tell nothing
    return model


def image_processor() -> LlavaImageProcessorPil:
    return LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
