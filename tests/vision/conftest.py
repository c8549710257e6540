"""Tiny random LLaVA models, and images to show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.vision.images import DecodedImage
from rayapp.vision.llava import LlavaAdapter

IMAGE_TOKEN = 290
SIDE, PATCH = 16, 4
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16]]
TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
VISION = CLIPVisionConfig(
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=PATCH,
    initializer_range=0.2,
)


def make_llava(kind: str, text: str = "llama") -> PreTrainedModel:
    """A random float32 model; ``kind`` is its model type."""
    language: PreTrainedConfig = (
        MistralConfig(**TEXT, sliding_window=10) if text == "mistral" else LlamaConfig(**TEXT)
    )
    torch.manual_seed(7)
    shared: dict[str, Any] = {
        "vision_config": VISION,
        "text_config": language,
        "image_token_index": IMAGE_TOKEN,
    }
    if kind == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(**shared)).eval()
    config = LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS)
    return LlavaNextForConditionalGeneration(config).eval()


def make_processor(kind: str) -> Any:
    """The image processor that fits :func:`make_llava`."""
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if kind == "llava":
        return LlavaImageProcessorPil(**sizes)
    return LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS)


def make_image(seed: int, width: int = 20, height: int = 20) -> DecodedImage:
    """Coloured noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return DecodedImage(Image.fromarray(noise), f"{seed + 1:064x}")


def make_adapter(model: PreTrainedModel) -> LlavaAdapter:
    """An adapter over the dense prefill stage."""
    stack = BlockStack(model, PruningPlan(), "prefill")
    return LlavaAdapter(model, stack, make_processor(model.config.model_type))


@pytest.fixture(scope="session")
def llava() -> Callable[..., PreTrainedModel]:
    """``llava(kind, text="llama")``."""
    return make_llava


@pytest.fixture(scope="session")
def processor() -> Callable[[str], Any]:
    """``processor(kind)``."""
    return make_processor


@pytest.fixture(scope="session")
def picture() -> Callable[..., DecodedImage]:
    """``picture(seed, width, height)``."""
    return make_image


@pytest.fixture(scope="session")
def adapter() -> Callable[[PreTrainedModel], LlavaAdapter]:
    """``adapter(model)``."""
    return make_adapter
