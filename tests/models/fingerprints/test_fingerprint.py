"""One fingerprint for one model, however it is stored; another for whatever changes its KV."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from rayapp.export import export_stage
from rayapp.models.architecture import (
    MULTIMODAL_TYPES,
    SUPPORTED_TYPES,
    compute_dtype,
    sliding_windows,
)
from rayapp.models.architecture import text_config as text_config_of
from rayapp.models.blocks import signature_of
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.fingerprints import fingerprint as fingerprint_module
from rayapp.models.fingerprints.fingerprint import weights_digest
from rayapp.models.fingerprints.kv_settings import kv_settings
from rayapp.models.fingerprints.sampled_fingerprint import sampled_fingerprint
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import PruningPlan
from rayapp.testbed import text_model_path, vision_model_path

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip


def fingerprint(path):
    return read_signature(path).weights_fingerprint


def rewrite(path, change):
    """Change ``config.json`` of a checkpoint in place; ``change`` takes its content."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return path


def rewritten(path, tmp_path, **values):
    copy = tmp_path / "rewritten"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    return rewrite(copy, lambda config: config.update(values))


def saved_again(path, directory, **options):
    config = Checkpoint(path).config
    is_text = config.model_type not in MULTIMODAL_TYPES
    kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    dtype = options.pop("dtype", "auto")
    kind.from_pretrained(path, dtype=dtype).save_pretrained(directory, **options)
    return directory


@pytest.mark.parametrize("path", [text_model_path(), vision_model_path()])
def test_the_same_model_saved_otherwise(path, tmp_path):
    ours = fingerprint(path)
    assert ours.startswith("v2:")
    assert len(ours) == 24  # so that a KV message's header weighs what it weighed
    wide = saved_again(path, tmp_path / "wide", dtype=torch.float32)
    assert Checkpoint(wide).config.dtype == torch.float32
    shards = saved_again(path, tmp_path / "shards", max_shard_size="300KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    export_stage(path, PruningPlan(), "unified", tmp_path / "exported")
    for copy in (wide, shards, tmp_path / "exported"):
        assert fingerprint(copy) == ours
        # The first scheme agreed on all of these too: a copy's plans can be renewed.
        assert sampled_fingerprint(Checkpoint(copy)) == sampled_fingerprint(Checkpoint(path))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_in_memory_and_on_disk(save_tiny, tiny_model, tmp_path, family, tied):
    path = save_tiny(tmp_path, family, tie_word_embeddings=tied)
    model = tiny_model(family, tie_word_embeddings=tied)
    assert signature_of(model) == read_signature(path) == signature_of(load_model(path).model)
    assert signature_of(tiny_model(family, tie_word_embeddings=not tied)) != signature_of(model)


@pytest.mark.parametrize("kind", MULTIMODAL_TYPES)
def test_a_llava_in_memory_and_on_disk(tiny_llava_path, llava, tmp_path, kind):
    path = tiny_llava_path(tmp_path, kind)
    assert signature_of(llava(kind)) == read_signature(path)


def test_what_older_releases_wrote(save_tiny, tiny_llava_path, tmp_path):
    """Names, buffers and keys of the configuration that transformers no longer writes."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    path = save_tiny(
        tmp_path, "llama", tie_word_embeddings=True, rope_parameters=dict(LLAMA3), **shape
    )
    ours = fingerprint(path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(path) == ours

    def older(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = {"type": rope["rope_type"], **rope}
        config["torch_dtype"] = config.pop("dtype")
        for name in ("head_dim", "attention_bias", "mlp_bias", "transformers_version"):
            config.pop(name)  # the default, or what follows from the others

    assert fingerprint(rewrite(path, older)) == ours
    vision = tiny_llava_path(tmp_path / "vision", "llava")
    ours, tensors = fingerprint(vision), load_file(vision / "model.safetensors")
    renamed = {_name_in_memory(name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(renamed, vision / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(vision) == ours


def _name_in_memory(name):
    """Files of a LLaVA keep the older nesting: ``language_model.model.layers...``."""
    head, _, rest = name.partition(".")
    if head == "language_model":
        return rest.replace("model.", "model.language_model.", 1)
    return f"model.{name}"


@torch.no_grad()
def test_one_element_anywhere(tiny_model, monkeypatch):
    """The samples of the first scheme missed nearly all of these."""
    monkeypatch.setattr(fingerprint_module, "_CHUNK_ELEMENTS", 1 << 12)
    state = {"a": torch.randn(70, 999), "b": torch.randn(3)}
    ours = weights_digest(state.items())
    assert weights_digest(reversed(state.items())) == ours
    for place in (0, 257, 4095, 4096, 30_000, 70 * 999 - 1):
        flat = state["a"].clone().reshape(-1)
        flat[place] += 0.5
        assert weights_digest({**state, "a": flat.view(70, 999)}.items()) != ours
    assert weights_digest({**state, "a": state["a"].view(999, 70)}.items()) != ours
    assert weights_digest({"a": state["a"], "c": state["b"]}.items()) != ours
    strided = state["a"].T.contiguous().T
    assert not strided.is_contiguous()
    assert weights_digest({**state, "a": strided}.items()) == ours
    model, other = tiny_model("llama"), tiny_model("llama")
    other.model.norm.weight[1] += 0.5
    assert signature_of(model) != signature_of(other)


def test_threads_and_many_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr(fingerprint_module, "_CHUNK_ELEMENTS", 64)
    tensors = {f"t{n}": torch.randn(n * 13 + 1) for n in range(60)}
    found = set()
    for threads in (1, 2, 7):
        monkeypatch.setattr(fingerprint_module.os, "cpu_count", lambda threads=threads: threads)
        found.add(weights_digest(tensors.items()))
    assert len(found) == 1


TEXT_CHANGES = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                         "partial_rotary_factor": 0.5}},
    {"rope_parameters": LLAMA3},
    *({"rope_parameters": {**LLAMA3, name: LLAMA3[name] * 2}} for name in LLAMA3
      if name != "rope_type"),
    {"rope_parameters": YARN},
    *({"rope_parameters": {**YARN, name: value}} for name, value in (
        ("factor", 2.0), ("beta_fast", 16), ("beta_slow", 2), ("attention_factor", 1.5),
        ("truncate", False), ("original_max_position_embeddings", 64))),
    {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}},
    {"rms_norm_eps": 1e-5},
    {"hidden_act": "gelu"},
    {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    {"tie_word_embeddings": True},
]  # fmt: skip


def test_settings_of_the_decoder(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama", rms_norm_eps=1e-6)
    found = [fingerprint(path)]
    found += [fingerprint(rewritten(path, tmp_path, **change)) for change in TEXT_CHANGES]
    assert len({*found}) == len(found)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", [{"attention_bias": True}, {"mlp_bias": True}]),
        ("qwen3", [{"attention_bias": True}]),
        ("mistral", [{"sliding_window": 13}, {"sliding_window": None}]),
        ("qwen2", [
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": None,
             "max_window_layers": n} for n in (1, 2)
        ]),
    ],
)  # fmt: skip
def test_biases_and_windows(save_tiny, tmp_path, family, changes):
    path = save_tiny(tmp_path, family)
    found = [fingerprint(path)]
    found += [fingerprint(rewritten(path, tmp_path, **change)) for change in changes]
    assert len({*found}) == len(found)


VISION_CHANGES = [
    {"vision_feature_layer": -1},
    {"vision_feature_layer": [-2, -1]},
    {"vision_feature_select_strategy": "full"},
    {"projector_hidden_act": "relu"},
    {"image_token_index": 5},
    {"multimodal_projector_bias": False},
]
TOWER_CHANGES = [
    {"hidden_act": "gelu"},
    {"layer_norm_eps": 1e-4},
    {"num_attention_heads": 4},
    {"patch_size": 8},
    {"image_size": 24},
]


def test_settings_of_the_vision_side(tiny_llava_path, tmp_path):
    path = tiny_llava_path(tmp_path / "llava", "llava")
    found = [fingerprint(path)]
    found += [fingerprint(rewritten(path, tmp_path, **change)) for change in VISION_CHANGES]
    tower = json.loads((path / "config.json").read_text())["vision_config"]
    text = json.loads((path / "config.json").read_text())["text_config"]
    for change in TOWER_CHANGES:
        found.append(fingerprint(rewritten(path, tmp_path, vision_config={**tower, **change})))
    for change in ({"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}):
        found.append(fingerprint(rewritten(path, tmp_path, text_config={**text, **change})))
    assert len({*found}) == len(found)
    for same in (2 + 1, [-2]):  # of four layers and the embeddings: the last but one
        assert fingerprint(rewritten(path, tmp_path, vision_feature_layer=same)) == found[0]
    following = tiny_llava_path(tmp_path / "next", "llava_next")
    changed = rewritten(following, tmp_path, image_grid_pinpoints=[[16, 32]])
    assert fingerprint(changed) != fingerprint(following)


def test_what_changes_no_kv(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama", rms_norm_eps=1e-5)
    ours = fingerprint(path)
    for change in (
        {"use_cache": False, "eos_token_id": 3, "initializer_range": 0.5},
        {"max_position_embeddings": 1024},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"rope_parameters": None},
        {"rms_norm_eps": 0.00001, "attention_dropout": 0.1, "name_of_the_author": "x"},
    ):
        assert fingerprint(rewritten(path, tmp_path, **change)) == ours
    yarn = fingerprint(rewritten(path, tmp_path, rope_parameters=YARN))
    spelled = {**YARN, "beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
    assert fingerprint(rewritten(path, tmp_path, rope_parameters=spelled)) == yarn


def test_the_longest_prompt_counts_where_rope_is_scaled_by_it(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    implied = {key: value for key, value in YARN.items() if key[:4] != "orig"}
    found = {
        fingerprint(
            rewritten(path, tmp_path, rope_parameters=implied, max_position_embeddings=length)
        )
        for length in (256, 512)
    }
    assert len(found) == 2


NO_KV = {
    "text": {
        "vocab_size",  # in the shape of the embedding, and in the signature
        "head_dim",  # taken with its default
        "max_position_embeddings", "rope_parameters",  # as the kind of RoPE reads them
        "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",  # as windows
        "tie_word_embeddings",  # of the whole model
        "initializer_range", "use_cache", "attention_dropout", "pretraining_tp",
        "pad_token_id", "bos_token_id", "eos_token_id",
    },
    "outer": {
        "text_config", "vision_config", "tie_word_embeddings", "vision_feature_layer",
        "image_seq_length",
    },
    "tower": {
        "attention_dropout", "initializer_range", "initializer_factor", "projection_dim",
        "vision_use_head",
    },
}  # fmt: skip


def _fields(config):
    """Settings that a configuration declares itself."""
    found = set(config.to_dict()) - set(PreTrainedConfig().to_dict()) - {"model_type"}
    assert len(found) > 5
    return found


@pytest.mark.parametrize("family", SUPPORTED_TYPES)
def test_every_setting_of_a_decoder_is_considered(tiny_model, family):
    """A release of transformers that adds a setting fails here, until somebody has looked at it."""
    config = tiny_model(family).config
    known = kv_settings(config, config, sliding_windows(config))["decoder"]
    assert _fields(config) - set(known) <= NO_KV["text"]


@pytest.mark.parametrize("kind", MULTIMODAL_TYPES)
def test_every_setting_of_the_vision_side_is_considered(llava, kind):
    config = llava(kind).config
    known = kv_settings(config, text_config_of(config), sliding_windows(config))
    assert _fields(config) - set(known["projector"]) <= NO_KV["outer"]
    assert _fields(config.vision_config) - set(known["tower"]) <= NO_KV["tower"]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_type_is_no_part_of_it(save_tiny, tmp_path, dtype):
    path = save_tiny(tmp_path, "llama")
    loaded = load_model(path, dtype=dtype)
    assert loaded.signature == read_signature(path)
    assert loaded.model.dtype == compute_dtype(Checkpoint(path).config, dtype)
