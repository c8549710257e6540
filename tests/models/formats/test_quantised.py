"""Checkpoints that are not plain numbers are refused by name, in one line, with the remedy."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from rayapp.errors import ModelError
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import locate
from rayapp.models.loading import load_model
from rayapp.models.tokenizer import load_tokenizer

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("quantised"), "llama")


@pytest.fixture
def configured(path, tmp_path):
    """``configured(**keys)``: a copy of the checkpoint with these keys in its config.json."""

    def make(**keys):
        for file in path.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | keys))
        return tmp_path

    return make


def refusal(path) -> str:
    with pytest.raises(ModelError) as refused:
        load_model(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"bits": 3}, "3 bits"),
        ({"zero_point": True}, "unnamed method"),
    ],
)
def test_a_quantised_checkpoint_is_refused_by_its_method(configured, settings, method):
    said = refusal(configured(quantization_config=settings))
    assert f"quantised ({method}" in said or f"({'by an ' + method})" in said
    assert "give the checkpoint that it was made from" in said


def test_other_tools_settings_are_known(configured):
    assert "(4 bits)" in refusal(configured(quantization={"group_size": 64, "bits": 4}))
    older = configured(compression_config={"quant_method": "sparseml"})
    assert "(sparseml)" in refusal(older)


@pytest.mark.parametrize(
    ("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")]
)
def test_a_file_beside_an_innocent_configuration_is_seen(configured, file, method):
    directory = configured()
    (directory / file).write_text('{"bits": 4}')
    assert f"quantised ({method})" in refusal(directory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_tensors_without_a_word_are_refused(configured, dtype):
    directory = configured()
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    said = refusal(directory)
    assert name in said
    assert str(dtype).removeprefix("torch.") in said


def test_what_transformers_has_dequantised_loads(configured):
    assert load_model(configured(quantization_config={"quant_method": "gguf"})).parameter_bytes


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SMALL, num_local_experts=4),
        Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16),
        Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16),
        OlmoeConfig(**SMALL, num_experts=4),
        DeepseekV3Config(**SMALL, n_routed_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_a_mixture_of_experts_is_refused_by_name(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as refused:
        Checkpoint(tmp_path)
    said = str(refused.value)
    assert (
        f"{config.model_type!r} (a mixture of experts) is not supported; use one of llama" in said
    )
    assert "\n" not in said


def test_a_gguf_is_refused_with_the_way_to_convert_it(tmp_path):
    file = tmp_path / "tiny.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    for given in (file, tmp_path / "none.gguf", "owner/name.gguf"):
        with pytest.raises(ModelError, match=r"gguf: a GGUF file is not loaded.*gguf_file=name"):
            locate(given)
    with pytest.raises(ModelError, match=r"no config\.json, only tiny\.Q4_1\.gguf"):
        Checkpoint(tmp_path)


def test_pickles_alone_are_refused(configured):
    directory = configured()
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pytorch_model.bin, which can run code" in refusal(directory)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(save_tiny, tmp_path, tiny_model):
    directory = save_tiny(tmp_path, "llama")
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens([f"<extra-{n}>" for n in range(45)])
    tokenizer.save_pretrained(directory)
    said = refusal(directory)
    assert "ids up to 302, and the model only 300 embeddings (first without: '<extra-42>'" in said
    with pytest.raises(ModelError, match="302"):
        load_tokenizer(directory)
    # Spare embeddings, as many models have, do no harm.
    wide = AutoModelForCausalLM.from_config(tiny_model("llama", vocab_size=303).config)
    wide.save_pretrained(directory)
    assert load_model(directory).tokenizer.convert_tokens_to_ids("<extra-44>") == 302
