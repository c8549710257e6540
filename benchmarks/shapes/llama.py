"""Llamas with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that decide how much work a Llama is."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int


SHAPES = {
    "tiny": LlamaShape(64, 4, 4, 2, 160, 300),
    "llama-1m": LlamaShape(128, 8, 4, 2, 320, 384),
    "llama-150m": LlamaShape(768, 12, 12, 4, 2048, 32_000),
    "llama-8b": LlamaShape(4096, 32, 32, 8, 14_336, 128_256),
}


def random_llama(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Llama of a named shape, made on the device that it runs on."""
    shape = SHAPES[name]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.rayapp_fingerprint = "random"  # hashing gigabytes of noise would tell nothing
    return model
