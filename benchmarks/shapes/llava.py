"""LLaVAs with random weights: LLaVA-1.5-7B's shapes, and smaller ones.

Every shape sees an image of 336 x 336 pixels as 576 tokens. The output of the tower's penultimate
block is read, as in LLaVA-1.5, and all its blocks run.
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
"""Numbers of images in prompts whose KV is weighed, up to LLaVA-1.5's context of 4,096."""


@dataclass(frozen=True)
class StackShape:
    """Width, blocks, heads and MLP width of a stack of blocks."""

    hidden: int
    blocks: int
    heads: int
    mlp: int


@dataclass(frozen=True)
class LlavaShape:
    """The language model, its vocabulary, and the vision tower."""

    text: StackShape
    vocab: int
    vision: StackShape


SHAPES = {
    "llava-7b": LlavaShape(
        StackShape(4096, 32, 32, 11_008), 32_064, StackShape(1024, 24, 16, 4096)
    ),
    "small": LlavaShape(StackShape(512, 8, 8, 1376), 2048, StackShape(256, 6, 4, 1024)),
    "tiny": LlavaShape(StackShape(64, 2, 2, 160), 300, StackShape(32, 2, 2, 64)),
}


def random_llava(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A LLaVA of a named shape, made on the device that it runs on."""
    shape = SHAPES[name]
    text = LlamaConfig(
        hidden_size=shape.text.hidden,
        num_hidden_layers=shape.text.blocks,
        num_attention_heads=shape.text.heads,
        num_key_value_heads=shape.text.heads,
        intermediate_size=shape.text.mlp,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision.hidden,
        num_hidden_layers=shape.vision.blocks,
        num_attention_heads=shape.vision.heads,
        intermediate_size=shape.vision.mlp,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=shape.vocab - 1)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    model.rayapp_fingerprint = "random"  # hashing gigabytes of noise would tell nothing
    return model


def image_processor() -> LlavaImageProcessorPil:
    """The processor that goes with every shape."""
    return LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
