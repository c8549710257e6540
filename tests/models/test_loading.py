"""A replica reads only what its stage runs, and refuses what it cannot trust."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rayapp.errors import ModelError, PlanError
from rayapp.models import checkpoint as checkpoint_module
from rayapp.models.blocks import signature_of
from rayapp.models.loading import load_model, read_signature
from rayapp.models.stack import BlockStack
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import PruningPlan


def make_plan(path):
    return PruningPlan.model_validate(
        {
            "model": read_signature(path),
            "prefill": {"blocks": {1: "kv_only", 3: "removed", 4: "mlp_and_kv"}},
            "decode": {"blocks": {0: "attention_only", 3: "removed", 4: "mlp_only"}},
        }
    )


class Recorder:
    def update(self, keys, values, block):
        return keys, values


@torch.no_grad()
def logits_of(model, plan, stage):
    ids = torch.arange(2, 14)[None]
    stack = BlockStack(model, plan, stage)
    return stack.logits(stack.run(stack.embed(ids), torch.arange(12)[None], Recorder()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_stage_is_read_in_part_and_computes_the_same(save_tiny, tmp_path, family, tied):
    path = save_tiny(tmp_path, family, tie_word_embeddings=tied)
    plan = make_plan(path)
    full = AutoModelForCausalLM.from_pretrained(path)
    for stage in ("prefill", "decode"):
        loaded = load_model(path, plan=plan, stage=stage)
        assert torch.equal(logits_of(loaded.model, plan, stage), logits_of(full, plan, stage))
        own = BlockStack(full, plan, stage).model
        assert loaded.parameter_bytes == sum(p.nbytes for p in own.parameters())
        assert loaded.signature == signature_of(full)


def test_only_needed_tensors_are_touched(save_tiny, tmp_path, monkeypatch):
    path = save_tiny(tmp_path, "llama")
    plan, read = make_plan(path), []
    monkeypatch.setattr(checkpoint_module.Checkpoint, "signature", lambda self: plan.model)
    original = checkpoint_module.Checkpoint.read

    def spy(self, names):
        for name, tensor in original(self, names):
            read.append(name)
            yield name, tensor

    monkeypatch.setattr(checkpoint_module.Checkpoint, "read", spy)
    load_model(path, plan=plan, stage="decode")
    assert not [n for n in read if "layers.3." in n]
    assert not [n for n in read if "layers.4.self_attn" in n or "layers.0.mlp" in n]
    assert [n for n in read if "layers.4.mlp" in n]


def test_unified_holds_the_union(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    plan = make_plan(path)
    full, unified = (
        AutoModelForCausalLM.from_pretrained(path),
        load_model(path, plan=plan, stage="unified"),
    )
    for stage in ("prefill", "decode"):
        assert torch.equal(logits_of(unified.model, plan, stage), logits_of(full, plan, stage))
    removed = [p for n, p in unified.model.named_parameters() if "layers.3." in n]
    assert all(p.is_meta for p in removed)
    assert unified.parameter_bytes < sum(p.nbytes for p in full.parameters())


def test_the_wrong_stage_is_refused(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    plan = make_plan(path)
    with pytest.raises(ModelError, match="not loaded"):
        BlockStack(load_model(path, plan=plan, stage="decode").model, plan, "prefill")


def test_sharded_checkpoints_and_element_types(tiny_model, save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    tiny_model("llama").save_pretrained(path, max_shard_size="60KB")
    (path / "model.safetensors").unlink()
    assert len(list(path.glob("*.safetensors"))) > 2
    assert torch.equal(
        logits_of(load_model(path).model, PruningPlan(), "decode"),
        logits_of(tiny_model("llama"), PruningPlan(), "decode"),
    )
    half = load_model(path, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.parameter_bytes * 2 == load_model(path).parameter_bytes
    assert half.signature == read_signature(path)


def test_greedy_generation_of_the_loaded_model(save_tiny, tiny_model, tmp_path):
    loaded = load_model(save_tiny(tmp_path, "mistral"))
    ids = torch.arange(5, 45)[None]
    want = tiny_model("mistral").generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(loaded.model.generate(ids, max_new_tokens=12, do_sample=False), want)
    assert loaded.eos_token_ids == (256,)


@torch.no_grad()
def test_a_decode_replica_of_llava_holds_no_vision_tower(make_llava, byte_tokenizer, tmp_path):
    model = make_llava()
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    plan = PruningPlan.model_validate(
        {"model": read_signature(tmp_path), "decode": {"blocks": {1: "mlp_only"}}}
    )
    assert plan.model == signature_of(model)
    loaded = {s: load_model(tmp_path, plan=plan, stage=s) for s in ("prefill", "decode")}
    for stage, part in loaded.items():
        assert torch.equal(logits_of(part.model, plan, stage), logits_of(model, plan, stage))
    text = BlockStack(model, plan, "decode").model
    vision = [p for n, p in text.named_parameters() if "vision_tower" in n or "projector" in n]
    total = sum(p.nbytes for p in text.parameters())
    assert loaded["decode"].parameter_bytes == total - sum(p.nbytes for p in vision)
    assert loaded["prefill"].parameter_bytes == sum(p.nbytes for p in model.parameters())


def test_refusals(save_tiny, tmp_path):
    with pytest.raises(ModelError, match="no such model directory"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path / "empty")
    path = save_tiny(tmp_path, "llama")
    with pytest.raises(PlanError, match="another model"):
        load_model(path, plan=make_plan(save_tiny(tmp_path, "qwen3")))
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(ModelError, match="safetensors"):
        load_model(path)
    weights.unlink()
    (path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="can run code"):
        load_model(path)


def test_missing_and_misshapen_tensors_are_named(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    with pytest.raises(ModelError, match=r"missing.*layers\.5"):
        load_model(path)
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 72}))
    with pytest.raises(ModelError, match="shape"):
        load_model(path)


def test_a_directory_without_tokenizer(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(path)


def test_shipped_tensors_are_safetensors(testbed_path):
    with safe_open(testbed_path / "model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) > 12
