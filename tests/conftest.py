"""Fixtures that every room shares: small random-weight models, and the test-bed."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports ray or torch: processes must agree on authentication, and workers that
# share two cores must not spin against each other.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()  # it would stand in what commands print

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}
FAMILIES = tuple(CONFIGS)
EOS = 256
SHAPES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 257,
    # Large enough that the two best logits lie well apart: greedy paths must not hang on rounding.
    "initializer_range": 0.2,
}


def make_tiny_model(family: str, **overrides: object) -> PreTrainedModel:
    """A random-weight float32 model; mistral has a sliding window shorter than prompts."""
    extra: dict[str, object] = {"sliding_window": 12} if family == "mistral" else {}
    config = CONFIGS[family](**{**SHAPES, **extra, **overrides})
    torch.manual_seed(sum(map(ord, family)))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids equal bytes; 256 ends an answer, 257 pads."""
    alphabet = _byte_symbols()
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for every byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def save_model(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model with the byte tokenizer as an ordinary checkpoint directory."""
    model.save_pretrained(directory)
    make_byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(family, **config overrides)``."""
    return make_tiny_model


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids equal bytes."""
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def save_tiny() -> Callable[..., Path]:
    """``save_tiny(directory, family, **overrides)`` writes a checkpoint; returns its path."""

    def save(directory: Path, family: str, **overrides: object) -> Path:
        return save_model(make_tiny_model(family, **overrides), directory / family)

    return save


@pytest.fixture(scope="session")
def testbed_path() -> Path:
    """The shipped test-bed text model."""
    from rayapp.testbed import text_model_path

    return text_model_path()


@pytest.fixture(autouse=True, scope="module")
def _collect_between_modules() -> object:
    yield
    gc.collect()
