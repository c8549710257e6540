"""A small LLaVA, for what concerns the language model inside it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)


def build_llava():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


@pytest.fixture
def make_llava():
    return build_llava
