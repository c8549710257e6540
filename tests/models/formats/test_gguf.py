"""A GGUF becomes the checkpoint of exactly the weights that Q4_1 left."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayapp.errors import InputError, ModelError
from rayapp.models.formats.block_quants import BLOCK, quantise, through
from rayapp.models.formats.gguf import write_dequantised
from rayapp.models.loading import load_model
from tests.models.formats.tiny_gguf import tiny_original, write_gguf

pytest.importorskip("gguf", reason="package gguf is not installed (extra `gguf`)")


def test_a_gguf_becomes_an_ordinary_checkpoint(tmp_path):
    original = tiny_original()
    out = tmp_path / "made"
    out.mkdir()
    write_dequantised(write_gguf(tmp_path / "tiny.gguf", original), out)
    loaded = load_model(out)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    wanted = dict(original.named_parameters())
    for name, made in loaded.model.named_parameters():
        tensor = wanted[name].detach()
        expected = through(tensor, "Q4_1") if tensor.dim() == 2 else tensor
        assert torch.equal(made, expected.to(torch.bfloat16)), name
    # Whoever does not know rayapp reads the same model.
    plain = AutoModelForCausalLM.from_pretrained(out).float().eval()
    ids = torch.arange(2, 40)[None]
    for tensor in original.parameters():
        kept = through(tensor.detach(), "Q4_1") if tensor.dim() == 2 else tensor.detach()
        tensor.data = kept.to(torch.bfloat16).float()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, original(ids).logits, atol=1e-4)
    assert loaded.tokenizer("ab c")["input_ids"] == [258, 32, 99]
    assert loaded.tokenizer.chat_template
    assert loaded.eos_token_ids == (256,)


def test_what_is_no_gguf_is_one_line(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match=r"bad\.gguf: cannot be read as GGUF") as no:
        write_dequantised(tmp_path / "bad.gguf", tmp_path)
    assert "\n" not in str(no.value)


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'rayapp\[gguf\]'"):
        write_dequantised(tmp_path / "any.gguf", tmp_path)


def test_q4_1_keeps_sixteen_levels_between_the_ends_of_a_block():
    torch.manual_seed(0)
    weights = torch.randn(6, 2 * BLOCK)
    kept = through(weights, "Q4_1")
    for before, after in zip(weights.view(-1, BLOCK), kept.view(-1, BLOCK), strict=True):
        assert len(after.unique()) <= 16
        step = (before.max() - before.min()) / 15
        assert (before - after).abs().max() <= step * 0.51
    assert through(weights.bfloat16(), "Q4_1").dtype == torch.bfloat16
    with pytest.raises(InputError, match="rows of 33 weights"):
        through(torch.zeros(2, 33), "Q4_1")


def test_a_model_is_rounded_as_its_file_would_be(tiny_model):
    untied = {"tie_word_embeddings": False, "hidden_size": 64, "intermediate_size": 96}
    before, after = (tiny_model("qwen2", **untied) for _ in range(2))
    quantise(after, "Q4_1")
    kinds = {"embed_tokens": "Q8_0", "lm_head": "Q8_0", "norm": None, "bias": None}
    wanted = dict(before.named_parameters())
    for name, weights in after.named_parameters():
        kind = next((kinds[part] for part in kinds if part in name), "Q4_1")
        expected = wanted[name] if kind is None else through(wanted[name], kind)
        assert torch.equal(weights, expected), name
