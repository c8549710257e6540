"""An exported checkpoint is the stage itself, to tools that have never heard of rayapp."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from rayapp import cli
from rayapp.errors import InputError, ModelError, PlanError
from rayapp.export import RECORD_FILE, export_stage
from rayapp.models import shards
from rayapp.models.blocks import apply_stage, sliding_windows
from rayapp.models.healed import HealedWeights
from rayapp.models.loading import load_model, read_signature
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
# Longer than mistral's window of 12, so that a wrong mask shows.
IDS = torch.arange(3, 43)[None]

# Run in another process, which must never see rayapp: logits of a directory.
PLAIN = """
import sys
sys.modules["rayapp"] = None
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
ids = load_file(sys.argv[2])["ids"]
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
with torch.no_grad():
    save_file({"logits": model.eval()(ids).logits}, sys.argv[3])
"""


class Recorder:
    """A cache that keeps nothing: the whole sequence is run at once."""

    def update(self, keys, values, block):
        return keys, values


@torch.no_grad()
def stage_logits(path, plan, stage, ids=IDS):
    """Our stack over a whole sequence."""
    stack = BlockStack(load_model(path, plan=plan, stage=stage).model, plan, stage)
    positions = torch.arange(ids.shape[1])[None]
    return stack.logits(stack.run(stack.embed(ids), positions, Recorder()))


@torch.no_grad()
def plain_logits(path, ids=IDS, auto=AutoModelForCausalLM, **inputs):
    return auto.from_pretrained(path).eval()(ids, **inputs).logits


def modes(blocks):
    """Modes by block; a bare list is of removed ones."""
    return blocks if isinstance(blocks, dict) else dict.fromkeys(blocks, "removed")


def plan_for(path, prefill=(), decode=(), **more):
    return PruningPlan.model_validate(
        {
            "model": read_signature(path),
            "prefill": {"blocks": modes(prefill)},
            "decode": {"blocks": modes(decode)},
            **more,
        }
    )


def names_in(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_gives_its_own_logits(save_tiny, tmp_path, family, tied):
    path = save_tiny(tmp_path, family, tie_word_embeddings=tied)
    plan = plan_for(path, prefill=[1], decode=[1, 3])
    for stage, kept in (("prefill", 4), ("decode", 3)):
        out = tmp_path / stage
        record = export_stage(path, plan, stage, out)
        assert torch.equal(plain_logits(out), stage_logits(path, plan, stage))
        assert len(record.kept_blocks) == kept == AutoConfig.from_pretrained(out).num_hidden_layers
        assert ("lm_head.weight" in names_in(out)) is not tied
    assert not torch.equal(plain_logits(tmp_path / "prefill"), plain_logits(tmp_path / "decode"))
    assert not torch.equal(plain_logits(tmp_path / "prefill"), plain_logits(path))


@pytest.mark.parametrize(("family", "tied"), [("mistral", False), ("qwen2", True)])
def test_plain_transformers_without_rayapp(save_tiny, tmp_path, family, tied):
    path = save_tiny(tmp_path, family, tie_word_embeddings=tied)
    plan = plan_for(path, prefill=[0, 2], decode=[0, 2])
    out = tmp_path / "out"
    export_stage(path, plan, "unified", out)
    save_file({"ids": IDS}, tmp_path / "ids")
    arguments = [out, tmp_path / "ids", tmp_path / "logits"]
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, arguments)], check=True, timeout=120)
    found = load_file(tmp_path / "logits")["logits"]
    for stage in ("prefill", "decode"):
        assert torch.equal(found, stage_logits(path, plan, stage))


def test_the_whole_checkpoint_generates_and_talks(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    (path / "LICENSE").write_text("terms")
    (path / "README.md").write_text("of another model")
    (path / "modeling_own.py").write_text("raise SystemExit")
    plan = plan_for(path, prefill=[2], decode=[2])
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    export_stage(path, plan, "unified", out)
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "LICENSE"} <= names
    assert not {"README.md", "modeling_own.py"} & names
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert {file.stat().st_mode & 0o444 for file in out.iterdir()} == {0o444}
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in (out, path))
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    model = AutoModelForCausalLM.from_pretrained(out)
    staged = apply_stage(AutoModelForCausalLM.from_pretrained(path), plan, "decode")
    answer = model.generate(IDS, max_new_tokens=6, do_sample=False)
    for end in range(IDS.shape[1], answer.shape[1]):
        logits = staged(answer[:, :end], use_cache=False).logits[0, -1]
        assert logits.argmax() == answer[0, end]
    again = load_model(out)
    assert again.signature.num_blocks == 4
    assert again.eos_token_ids == (256,)


def test_the_record_says_where_it_comes_from(save_tiny, tmp_path, caplog):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(
        path,
        prefill=[1],
        decode=[1, 4],
        first_token="decode",
        kv_transfer={0: {"first": 2, "last": 4}, 2: {"encoding": "int8"}, 3: {}},
        visual_tokens={"num_keep": 4},
    )
    with caplog.at_level(logging.WARNING, logger="rayapp"):
        export_stage(path, plan, "decode", tmp_path / "out")
    found = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert found["kept_blocks"] == [0, 2, 3]
    assert found["removed_blocks"] == [1, 4]
    assert found["stage"] == "decode"
    assert found["plan_fingerprint"] == plan.fingerprint
    assert found["source"] == plan.model.model_dump()
    said = " ".join(found["not_carried"])
    assert "kv_transfer of blocks [0, 2]" in said
    assert "visual_tokens" in said
    assert "first_token" in said
    assert all(sentence in caplog.text for sentence in found["not_carried"])


def test_nothing_is_said_where_all_is_carried(save_tiny, tmp_path, caplog):
    path = save_tiny(tmp_path, "llama")
    with caplog.at_level(logging.WARNING, logger="rayapp"):
        record = export_stage(path, plan_for(path, decode=[1]), "decode", tmp_path / "out")
    assert record.not_carried == ()
    assert not caplog.text


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("spelled", [True, False])
def test_sliding_windows_stay_with_their_blocks(save_tiny, tmp_path, family, spelled):
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


def test_mixed_windows_in_any_order(save_tiny, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    path = save_tiny(
        tmp_path, "qwen3", use_sliding_window=True, sliding_window=8, layer_types=kinds
    )
    plan = plan_for(path, prefill=[1], decode=[1])
    export_stage(path, plan, "prefill", tmp_path / "out")
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "prefill"))
    assert sliding_windows(AutoConfig.from_pretrained(tmp_path / "out")) == (8, 8, None, 8)


def test_lists_that_are_not_about_blocks_stay(save_tiny, tmp_path):
    ends = [256, 255, 254, 253, 252]  # as many as blocks
    path = save_tiny(tmp_path, "llama", eos_token_id=ends)
    export_stage(path, plan_for(path, decode=[1]), "decode", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == ends


def test_settings_keep_their_authors_spelling(save_tiny, tmp_path):
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


def test_sharded_in_and_out_one_shard_in_memory(tiny_model, save_tiny, tmp_path, monkeypatch):
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


def test_element_type_and_bits_are_the_checkpoints(testbed_path, tmp_path):
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


def test_a_stored_copy_of_a_tied_head_is_left_out(save_tiny, tmp_path):
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


def test_an_empty_plan_is_the_dense_model(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "qwen3")
    record = export_stage(path, PruningPlan(), "unified", tmp_path / "out")
    assert record.kept_blocks == (0, 1, 2, 3, 4)
    assert torch.equal(plain_logits(tmp_path / "out"), plain_logits(path))


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


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@torch.no_grad()
def test_llava_keeps_its_vision_tower_for_prefill(byte_tokenizer, tmp_path, kind):
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
def test_decode_of_llava_is_the_language_model(byte_tokenizer, tmp_path, kind):
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


@pytest.mark.parametrize(
    ("prefill", "decode", "stage", "wanted"),
    [
        ({1: "kv_only"}, {}, "prefill", r"prefill.* 1 \(kv_only\).*--no-kv-modes"),
        ({1: "kv_only"}, {1: "removed"}, "unified", r"prefill.* 1 \(kv_only\).*--shared"),
        ({2: "mlp_and_kv"}, {}, "prefill", r"2 \(mlp_and_kv\).*--unit block and --no-kv-modes"),
        (
            {},
            {0: "attention_only", 4: "mlp_only"},
            "decode",
            r"decode.* 0 \(attention_only\), 4 \(mlp_only\).*--unit block",
        ),
        ({}, {4: "mlp_only"}, "unified", r"decode.* 4 \(mlp_only\)"),
        ({1: "removed"}, {1: "removed", 3: "removed"}, "unified", r"\[1\].*\[1, 3\].*--shared"),
        ({}, dict.fromkeys(range(5), "removed"), "decode", "none of the 5 blocks"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused(
    save_tiny, tmp_path, prefill, decode, stage, wanted
):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, prefill=prefill, decode=decode)
    with pytest.raises(PlanError, match=wanted) as caught:
        export_stage(path, plan, stage, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_the_other_stage_may_hold_parts(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, prefill={1: "kv_only"}, decode=[3])
    export_stage(path, plan, "decode", tmp_path / "out")
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))


def test_the_wrong_model_and_taken_places_are_refused(save_tiny, tmp_path):
    path, other = save_tiny(tmp_path, "llama"), save_tiny(tmp_path, "qwen3")
    plan = plan_for(path, decode=[1])
    with pytest.raises(PlanError, match="another model"):
        export_stage(other, plan, "decode", tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        export_stage(path, plan, "decode", path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        export_stage(path, plan, "decode", tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        export_stage(path, plan, "decode", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "llama", "qwen3"]


def test_a_failure_leaves_nothing_behind(save_tiny, tmp_path, monkeypatch):
    path = save_tiny(tmp_path, "llama")
    plan, before = plan_for(path, decode=[1]), sorted(p.name for p in tmp_path.iterdir())
    calls = []

    def full(*_, **__):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", lambda *a, **k: (save_file(*a, **k), full()))
    with pytest.raises(InputError, match="No space left"):
        export_stage(path, plan, "decode", tmp_path / "out", max_shard_bytes=1)
    assert len(calls) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_incomplete_and_misshapen_sources_are_named(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, decode=[1]).model_copy(update={"model": None})
    tensors = load_file(path / "model.safetensors")
    lost = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors are missing"):
        export_stage(path, plan, "decode", tmp_path / "out")
    tensors["model.layers.2.mlp.up_proj.weight"] = lost[:-1]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.2\.mlp.*shape"):
        export_stage(path, plan, "decode", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def healed_plan(plan, directory, **stages):
    """The plan with these healed tensors, as it is read from its directory."""
    healed = HealedWeights.of(stages)
    healed.save(directory)
    plan.with_healed(healed.digest, directory).save(directory)
    return PruningPlan.load(directory)


def healed_tensors(path, block=2):
    tensors = load_file(path / "model.safetensors")
    names = (f"layers.{block}.mlp.up_proj.weight", f"layers.{block}.input_layernorm.weight")
    torch.manual_seed(3)
    return {n: t + 0.1 * torch.randn_like(t) for n in names for t in [tensors[f"model.{n}"]]}


def test_healed_tensors_replace_those_of_their_stage(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    bare = plan_for(path, prefill=[1], decode=[1])
    plan = healed_plan(bare, tmp_path / "plan", decode=healed_tensors(path))
    for stage in ("prefill", "decode"):
        record = export_stage(path, tmp_path / "plan", stage, tmp_path / stage)
        assert record.healed == plan.healed
        assert torch.equal(plain_logits(tmp_path / stage), stage_logits(path, plan, stage))
    dense = stage_logits(path, bare, "decode")
    assert torch.equal(plain_logits(tmp_path / "prefill"), dense)
    assert not torch.equal(plain_logits(tmp_path / "decode"), dense)
    with pytest.raises(PlanError, match=r"2 tensors are healed apart.*layers\.2.*--shared"):
        export_stage(path, plan, "unified", tmp_path / "unified")


def test_unified_where_both_stages_are_healed_alike(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    alike = healed_tensors(path)
    plan = plan_for(path, prefill=[0], decode=[0])
    copies = {name: tensor.clone() for name, tensor in alike.items()}
    plan = healed_plan(plan, tmp_path / "plan", prefill=alike, decode=copies)
    export_stage(path, plan, "unified", tmp_path / "out")
    for stage in ("prefill", "decode"):
        assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, stage))


def test_healed_tensors_take_the_checkpoints_type(testbed_path, tmp_path):
    tensors = {n: t.float() for n, t in healed_tensors(testbed_path, 7).items()}
    plan = healed_plan(plan_for(testbed_path, decode=[5]), tmp_path / "plan", decode=tensors)
    export_stage(testbed_path, plan, "decode", tmp_path / "out")
    for name, tensor in tensors.items():
        moved = f"model.{name.replace('.7.', '.6.')}"
        found = load_file(tmp_path / "out" / "model.safetensors")[moved]
        assert torch.equal(found, tensor.bfloat16())


def test_healed_tensors_that_do_not_fit_are_refused(save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, decode=[1])
    for number, tensors in enumerate(
        (
            healed_tensors(path, 1),  # of a removed block
            {n: t[:-1] for n, t in healed_tensors(path).items()},
        )
    ):
        unfit = healed_plan(plan, tmp_path / f"plan{number}", decode=tensors)
        with pytest.raises(PlanError, match=r"healed tensor 'layers.* fits none"):
            export_stage(path, unfit, "decode", tmp_path / "out")
    (tmp_path / "plan0" / "weights.safetensors").unlink()
    with pytest.raises(PlanError, match="is missing"):
        export_stage(path, tmp_path / "plan0", "decode", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run(monkeypatch, capsys):
    """``run("--stage", ...)`` of ``rayapp export``: exit code, standard output and error."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["rayapp", "export", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_the_command(run, save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, prefill={1: "kv_only"}, decode=[1])
    saved = plan.save(tmp_path / "plan").parent
    arguments = ("--model", path, "--plan", saved, "--out", tmp_path / "out")
    code, out, err = run(*arguments, "--stage", "decode")
    assert code == 0, err
    assert "decode with 4 of 5 blocks" in out
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))
    for options, said in (
        (("--stage", "decode"), "not empty"),
        (("--stage", "prefill"), r"1 (kv_only)"),
        (("--stage", "unified"), "--shared"),
        (("--stage", "decode", "--plan", tmp_path / "no"), "cannot be read"),
        (("--stage", "decode", "--model", tmp_path / "no"), "no such model directory"),
    ):
        code, _, err = run(*arguments, *options)
        assert code == 2
        assert said in err
        assert len(err.strip().splitlines()) == 1
    assert run(*arguments, "--stage", "both")[0] == 2
    shutil.rmtree(tmp_path / "out")
    assert run(*arguments)[0] == 2
