"""An exported checkpoint is the stage itself, to tools that have never heard of rayapp."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rayapp.export import RECORD_FILE, export_stage
from rayapp.models.blocks import apply_stage
from rayapp.models.loading import load_model
from rayapp.plan import PruningPlan

CASES = [
    *(("llama", True), ("mistral", False), ("qwen2", True), ("qwen3", False)),
    *(pytest.param(family, tied, marks=pytest.mark.slow) for family, tied in
      (("llama", False), ("mistral", True), ("qwen2", False), ("qwen3", True))),
]  # fmt: skip

# Run in another process, which must never see rayapp: logits of directories.
PLAIN = """
import sys
sys.modules["rayapp"] = None
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
ids = load_file(sys.argv[1])["ids"]
for directory in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        save_file({"logits": model.eval()(ids).logits}, directory + "-logits")
"""


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_each_stage_gives_its_own_logits(
    save_tiny, tmp_path, family, tied, plan_for, stage_logits, plain_logits, names_in
):
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


@pytest.mark.slow
def test_plain_transformers_without_rayapp(save_tiny, tmp_path, plan_for, stage_logits, ids):
    plans = {}
    for family, tied in (("mistral", False), ("qwen2", True)):
        path = save_tiny(tmp_path, family, tie_word_embeddings=tied)
        plans[path] = plan_for(path, prefill=[0, 2], decode=[0, 2])
        export_stage(path, plans[path], "unified", tmp_path / f"{family}-out")
    save_file({"ids": ids}, tmp_path / "ids")
    arguments = [tmp_path / "ids", *(f"{path}-out" for path in plans)]
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, arguments)], check=True, timeout=280)
    for path, plan in plans.items():
        found = load_file(f"{path}-out-logits")["logits"]
        for stage in ("prefill", "decode"):
            assert torch.equal(found, stage_logits(path, plan, stage))


def test_the_whole_checkpoint_generates_and_talks(save_tiny, tmp_path, plan_for, ids):
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
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)
    for end in range(ids.shape[1], answer.shape[1]):
        logits = staged(answer[:, :end], use_cache=False).logits[0, -1]
        assert logits.argmax() == answer[0, end]
    again = load_model(out)
    assert again.signature.num_blocks == 4
    assert again.eos_token_ids == (256,)


def test_an_empty_plan_is_the_dense_model(save_tiny, tmp_path, plain_logits):
    path = save_tiny(tmp_path, "qwen3")
    record = export_stage(path, PruningPlan(), "unified", tmp_path / "out")
    assert record.kept_blocks == (0, 1, 2, 3, 4)
    assert torch.equal(plain_logits(tmp_path / "out"), plain_logits(path))


def test_the_other_stage_may_hold_parts(save_tiny, tmp_path, plan_for, stage_logits, plain_logits):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, prefill={1: "kv_only"}, decode=[3])
    export_stage(path, plan, "decode", tmp_path / "out")
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))


def test_the_record_says_where_it_comes_from(save_tiny, tmp_path, caplog, plan_for):
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


def test_nothing_is_said_where_all_is_carried(save_tiny, tmp_path, caplog, plan_for):
    path = save_tiny(tmp_path, "llama")
    with caplog.at_level(logging.WARNING, logger="rayapp"):
        record = export_stage(path, plan_for(path, decode=[1]), "decode", tmp_path / "out")
    assert record.not_carried == ()
    assert not caplog.text
