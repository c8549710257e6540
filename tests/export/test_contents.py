"""What files of an export hold: settings, shards and bits as their authors wrote them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rayapp.export import export_stage
from rayapp.models import shards
from rayapp.models.architecture import sliding_windows
from rayapp.models.formats.origin import Origin, read_origin
from rayapp.models.hub import from_directory
from rayapp.models.loading import read_signature


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("spelled", [True, False])
def test_sliding_windows_stay_with_their_blocks(
    save_tiny, tmp_path, family, spelled, plan_for, stage_logits, plain_logits
):
    path = save_tiny(
        tmp_path, family, use_sliding_window=True, sliding_window=8, max_window_layers=2
    )
    config = json.loads((path / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 3
    if not spelled:  # as older releases wrote it: only the number from which on blocks slide
        del config["layer_types"]
        (path / "config.json").write_text(json.dumps(config))
    plan = plan_for(path, decode=[0, 3])
    export_stage(path, plan, "decode", tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["layer_types"] == ["full_attention"] + ["sliding_attention"] * 2
    assert exported["max_window_layers"] == 1
    assert sliding_windows(AutoConfig.from_pretrained(tmp_path / "out")) == (None, 8, 8)
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))


def test_mixed_windows_in_any_order(save_tiny, tmp_path, plan_for, stage_logits, plain_logits):
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    path = save_tiny(
        tmp_path, "qwen3", use_sliding_window=True, sliding_window=8, layer_types=kinds
    )
    plan = plan_for(path, prefill=[1], decode=[1])
    export_stage(path, plan, "prefill", tmp_path / "out")
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "prefill"))
    assert sliding_windows(AutoConfig.from_pretrained(tmp_path / "out")) == (8, 8, None, 8)


def test_lists_that_are_not_about_blocks_stay(save_tiny, tmp_path, plan_for):
    ends = [256, 255, 254, 253, 252]  # as many as blocks
    path = save_tiny(tmp_path, "llama", eos_token_id=ends)
    export_stage(path, plan_for(path, decode=[1]), "decode", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == ends


def test_settings_keep_their_authors_spelling(
    save_tiny, tmp_path, plan_for, stage_logits, plain_logits
):
    """An older tool must read the rotary base of an older checkpoint, not its own default."""
    path = save_tiny(tmp_path, "llama")
    file = path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    old = {"rope_theta": 500.0, "torch_dtype": "float32", "auto_map": {"AutoModel": "x.Y"}}
    file.write_text(json.dumps(config | old | {"_name_or_path": "/home/someone"}))
    plan = plan_for(path, decode=[1])
    export_stage(path, plan, "decode", tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["rope_theta"] == 500.0
    assert not {"auto_map", "_name_or_path", "rope_parameters"} & set(exported)
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))


def test_sharded_in_and_out_one_shard_in_memory(
    tiny_model, save_tiny, tmp_path, monkeypatch, plan_for, stage_logits, plain_logits, names_in
):
    path = save_tiny(tmp_path, "llama")
    tiny_model("llama").save_pretrained(path, max_shard_size="60KB")
    (path / "model.safetensors").unlink()
    plan = plan_for(path, decode=[0])
    held = []
    original = shards.save_file

    def spy(tensors, *arguments, **options):
        held.append((len(tensors), sum(t.nbytes for t in tensors.values())))
        original(tensors, *arguments, **options)

    monkeypatch.setattr(shards, "save_file", spy)
    export_stage(path, plan, "decode", tmp_path / "out", max_shard_bytes=70_000)
    assert len(held) > 2
    assert all(size <= 70_000 or count == 1 for count, size in held)
    names = names_in(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == names
    assert index["metadata"]["total_size"] == sum(size for _, size in held)
    assert not [name for name in names if "layers.4." in name]
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))


def test_element_type_and_bits_are_the_checkpoints(testbed_path, tmp_path, plan_for):
    plan = plan_for(testbed_path, prefill=[5], decode=[5])
    export_stage(testbed_path, plan, "unified", tmp_path / "out")
    source = load_file(testbed_path / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in exported.items():
        assert tensor.dtype == torch.bfloat16
        old = name
        if name.startswith("model.layers."):
            number = int(name.split(".")[2])
            old = name.replace(f".{number}.", f".{number + (number >= 5)}.", 1)
        assert torch.equal(tensor, source[old])
    assert len(exported) == len(source) - 9
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_stored_copy_of_a_tied_head_is_left_out(
    save_tiny, tmp_path, plan_for, stage_logits, plain_logits, names_in
):
    path = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old releases
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    plan = plan_for(path, decode=[1])
    export_stage(path, plan, "decode", tmp_path / "out")
    assert "lm_head.weight" not in names_in(tmp_path / "out")
    assert not [name for name in names_in(tmp_path / "out") if "inv_freq" in name]
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))


def test_an_export_repeats_where_its_model_comes_from(save_tiny, tmp_path, plan_for):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, prefill=[1], decode=[1])
    export_stage(path, plan, "decode", tmp_path / "unknown")
    assert from_directory(tmp_path / "unknown").caption == ""
    signature = read_signature(path)
    origin = Origin(
        caption="Small, from Q4_1",
        source="small 1.0",
        source_sha256="0" * 64,
        license="MIT",
        weights_fingerprint=signature.weights_fingerprint,
        files={},
    )
    origin.write(path)
    record = export_stage(path, plan, "prefill", tmp_path / "out")
    exported = read_origin(tmp_path / "out")
    told = f"the prefill stage of Small, from Q4_1 under plan {record.plan_fingerprint}"
    assert exported.caption == from_directory(tmp_path / "out").caption == told
    assert exported.weights_fingerprint == read_signature(tmp_path / "out").weights_fingerprint
    assert list(exported.changed_files(tmp_path / "out")) == []
    assert "model.safetensors" in exported.files
