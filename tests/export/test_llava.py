"""LLaVA checkpoints: prefill keeps the vision tower, decode is the language model alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from rayapp.export import export_stage
from rayapp.models.blocks import apply_stage


def make_llava(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=300, num_hidden_layers=4, num_key_value_heads=2, **sizes)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    if kind == "llava":
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=299)
        return LlavaForConditionalGeneration(config).eval()
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=299,
        image_grid_pinpoints=[[28, 28], [28, 56]],
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config).eval()


def picture(kind):
    """A prompt with one image, and what the model's forward takes for it."""
    torch.manual_seed(1)
    if kind == "llava":
        inputs, count = {"pixel_values": torch.randn(1, 3, 28, 28)}, 4
    else:  # base image, one tile, a newline per row of the tile
        inputs = {
            "pixel_values": torch.randn(1, 2, 3, 28, 28),
            "image_sizes": torch.tensor([[28, 28]]),
        }
        count = 4 + 4 + 2
    return torch.tensor([[5, *[299] * count, 7, 8, 9]]), inputs


@pytest.mark.parametrize("kind", [pytest.param("llava", marks=pytest.mark.slow), "llava_next"])
@torch.no_grad()
def test_llava_keeps_its_vision_tower_for_prefill(
    byte_tokenizer, tmp_path, kind, plan_for, stage_logits, plain_logits
):
    path, model = tmp_path / "model", make_llava(kind)
    model.save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    plan = plan_for(path, prefill=[0, 2], decode=[0, 2])
    ids, inputs = picture(kind)
    staged = apply_stage(model, plan, "prefill")(ids, **inputs, use_cache=False).logits
    for stage in ("prefill", "unified"):
        out = tmp_path / stage
        export_stage(path, plan, stage, out)
        loaded = AutoModelForImageTextToText.from_pretrained(out)
        assert loaded.config.text_config.num_hidden_layers == 2
        assert loaded.config.vision_config.num_hidden_layers == 2
        assert torch.equal(loaded.eval()(ids, **inputs).logits, staged)
        found = plain_logits(out, auto=AutoModelForImageTextToText)
        assert torch.equal(found, stage_logits(path, plan, "prefill"))


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_decode_of_llava_is_the_language_model(
    byte_tokenizer, tmp_path, kind, plan_for, stage_logits, plain_logits, names_in
):
    path = tmp_path / "model"
    make_llava(kind).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    plan = plan_for(path, decode=[1])
    record = export_stage(path, plan, "decode", tmp_path / "out")
    assert "vision tower" in " ".join(record.not_carried)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not [n for n in names_in(tmp_path / "out") if "vision" in n or "projector" in n]
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))
