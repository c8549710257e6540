"""Images to show to tiny LLaVA models, and adapters over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedModel

from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.vision.images import DecodedImage
from rayapp.vision.llava import LlavaAdapter


def make_image(seed: int, width: int = 20, height: int = 20) -> DecodedImage:
    """A decoded image of coloured noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return DecodedImage(Image.fromarray(noise), f"{seed + 1:064x}")


@pytest.fixture(scope="session")
def picture() -> Callable[..., DecodedImage]:
    """``picture(seed, width, height)``."""
    return make_image


@pytest.fixture(scope="session")
def adapter(processor: Callable[[str], Any]) -> Callable[[PreTrainedModel], LlavaAdapter]:
    """``adapter(model)``: over the dense prefill stage."""

    def make(model: PreTrainedModel) -> LlavaAdapter:
        stack = BlockStack(model, PruningPlan(), "prefill")
        return LlavaAdapter(model, stack, processor(model.config.model_type))

    return make
