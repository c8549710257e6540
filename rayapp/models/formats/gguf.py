"""GGUF files as ordinary checkpoints: dequantised once by transformers, written in bfloat16."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

from rayapp.errors import InputError, ModelError
from rayapp.models.shards import write_shards

_DROPPED = ("quantization_config", "_name_or_path")


def gguf_package() -> Any:
    """Return package ``gguf``, llama.cpp's own; an :class:`InputError` if it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise InputError(
            "package gguf is not installed, and reading GGUF needs it; run "
            "`pip install 'rayapp[gguf]'`, or `pip install gguf`"
        ) from None


def write_dequantised(file: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a checkpoint in bfloat16.

    Args:
        file: The GGUF file, of an architecture that transformers reads.
        directory: The existing directory for the checkpoint.

    Raises:
        InputError: Package ``gguf`` is not installed.
        ModelError: The file cannot be read, or transformers does not know its architecture.
        OSError: The checkpoint cannot be written.
    """
    gguf_package()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    transformers_logging.disable_progress_bar()
    try:
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # noqa: BLE001 - whatever a foreign parser raises is the user's file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{file}: cannot be read as GGUF ({reason}); give a whole file of a model that "
            "transformers can dequantise"
        ) from None
    _write(read, directory)
    tokenizer.save_pretrained(directory)


def _write(read: PreTrainedModel, directory: Path) -> None:
    """Write a model that transformers has dequantised, without a word of its quantisation."""
    settings = {k: v for k, v in read.config.to_dict().items() if k not in _DROPPED}
    config = type(read.config)(**{**settings, "dtype": "bfloat16"})
    config.architectures = [type(read).__name__]
    config.save_pretrained(directory)
    read.generation_config.save_pretrained(directory)
    # Tied parameters are listed once, under the embeddings' name.
    parameters = read.named_parameters()
    write_shards(directory, ((name, p.detach().to(torch.bfloat16)) for name, p in parameters))
