"""The memory of replicas, told by configurations alone, against what loaded models hold."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from rayapp.errors import PlanError
from rayapp.models.architecture import signature
from rayapp.models.blocks import signature_of
from rayapp.models.footprint import Limits, footprint, parts_of
from rayapp.models.loading import load_model
from rayapp.plan import PruningPlan

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "dtype": "bfloat16",
}
LIMITS = Limits(max_model_len=8192, max_num_seqs=8, max_num_batched_tokens=512)
PLAN = {"prefill": {"blocks": {1: "kv_only"}}, "decode": {"blocks": {2: "removed", 3: "mlp_only"}}}
GIB = 1 << 30


def test_llama_8b_weighs_what_is_known_of_it():
    held = footprint(LlamaConfig(**LLAMA_8B), PruningPlan(), "decode", LIMITS)
    assert held.weight_bytes == 2 * 8_030_261_248
    assert held.sequence_bytes == 8192 * 128 * 1024, "128 KiB a token"
    assert held.kv_tokens(24 * GIB) == held.kv_bytes(24 * GIB) // (128 * 1024)
    assert held.kv_tokens(8 * GIB) == 0
    assert 15 * GIB < held.least_bytes < 17 * GIB


def test_a_plan_makes_stages_smaller_and_float32_twice_as_large():
    config = LlamaConfig(**LLAMA_8B)
    removed = {"decode": {"blocks": dict.fromkeys(range(8, 16), "removed")}}
    shape = signature(config, "v2:" + "0" * 21)
    plan = PruningPlan.model_validate({"model": shape.model_dump(), **removed})
    dense, pruned = (footprint(config, p, "decode", LIMITS) for p in (PruningPlan(), plan))
    assert dense.weight_bytes - pruned.weight_bytes == 8 * 2 * 218_112_000
    assert pruned.sequence_bytes * 4 == dense.sequence_bytes * 3
    wide = footprint(config, plan, "decode", LIMITS, dtype="float32")
    assert wide.weight_bytes == 2 * pruned.weight_bytes
    assert footprint(config, plan, "unified", LIMITS).weight_bytes == dense.weight_bytes
    assert [parts_of(mode) for mode in ("unified", "disaggregated")] == [
        ("unified",), ("prefill", "decode"),
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", ["prefill", "decode", "unified"])
def test_weights_are_those_of_a_loaded_stage(part, tied, tiny_model, tmp_path, byte_tokenizer):
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    plan = PruningPlan.model_validate({"model": signature_of(model).model_dump(), **PLAN})
    loaded = load_model(tmp_path, plan=plan, stage=part, packed=True)
    held = footprint(model.config, plan, part, LIMITS)
    assert held.weight_bytes == loaded.parameter_bytes
    on_gpu = footprint(model.config, plan, part, LIMITS, on_cpu=False)
    table = model.get_input_embeddings().weight.nbytes
    assert held.weight_bytes - on_gpu.weight_bytes == (table if tied else 0)


def test_windows_bound_the_kv_of_a_sequence(tiny_model):
    config = tiny_model("mistral").config
    for length, entries in ((5, 5), (400, 12)):
        held = footprint(config, PruningPlan(), "decode", Limits(length, 2, 8))
        assert held.sequence_bytes == 5 * entries * 2 * 2 * 16 * torch.float32.itemsize


def test_a_step_grows_with_what_runs_in_it():
    config = LlamaConfig(**LLAMA_8B)
    small, large = (
        footprint(config, PruningPlan(), "unified", Limits(2048, seqs, tokens)).step_bytes
        for seqs, tokens in ((8, 512), (64, 4096))
    )
    assert small < large


def test_a_plan_of_another_shape_is_refused(tiny_model):
    model = tiny_model("llama")
    plan = PruningPlan(model=signature_of(model))
    with pytest.raises(PlanError, match="hidden_size"):
        footprint(LlamaConfig(**LLAMA_8B), plan, "decode", LIMITS)
