"""The shipped directory: small, bf16, ordinary, and right."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from rayapp.testbed import vision_model_path
from rayapp.testbed.vision.attention import attend_packed
from rayapp.testbed.vision.questions.questions import TYPES
from rayapp.testbed.vision.score import draw_asked_scenes, score


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(vision_model_path()).eval()


def test_directory_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in vision_model_path().iterdir()}
    assert sum(files.values()) <= 5_000_000
    wanted = {"README.md", "config.json", "tokenizer.json", "preprocessor_config.json"}
    assert wanted <= set(files)


def test_weights_on_disk_are_bf16() -> None:
    with safe_open(vision_model_path() / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_a_picture_is_576_tokens(model) -> None:
    assert model.config.image_seq_length == 576
    assert model.config.text_config.max_position_embeddings >= 1024


@pytest.mark.slow
@torch.inference_mode()
def test_it_answers_about_pictures_that_training_never_showed(model) -> None:
    """The card has thousands of questions; these are enough that a broken export or generator
    shows.
    """
    shares = score(attend_packed(model), draw_asked_scenes("test", 32, 11))
    assert set(shares) == set(TYPES)
    assert min(shares.values()) >= 0.85
    assert sum(shares.values()) / len(shares) >= 0.95
