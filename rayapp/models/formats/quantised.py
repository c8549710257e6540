"""Refusal of checkpoints whose weights are quantised, by the name of the method.

A stage computes with plain matrix products, so weights must be floating-point numbers as they are.
Read as such, packed integers or scaled 8-bit floats would give a model that answers nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from rayapp.errors import ModelError

LOADABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Element types of a checkpoint's tensors that are plain numbers."""

# transformers leaves this name in the configuration of weights that it has dequantised.
_GGUF = "gguf"
_REMEDY = (
    "rayapp computes with plain floating-point weights; give the checkpoint that it was made from"
)
# Keys of config.json, most common first: transformers', MLX's, and the first name that
# compressed-tensors had.
_KEYS = ("quantization_config", "quantization", "compression_config")
# Files that older tools wrote beside a configuration that says nothing of quantisation.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": ""}


def check_unquantised(path: Path, config: PreTrainedConfig) -> None:
    """Raise :class:`ModelError` if the checkpoint in ``path`` is quantised, and name the method."""
    method = next(_methods(path, config), None)
    if method is not None:
        raise ModelError(f"{path}: its weights are quantised ({method}); {_REMEDY}")


def check_plain(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise :class:`ModelError` if a stored parameter is of no plain floating-point type."""
    if tensor.dtype not in LOADABLE:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(f"{path}: tensor {name!r} is stored as {kind}, quantised; {_REMEDY}")


def _methods(path: Path, config: PreTrainedConfig) -> Iterator[str]:
    """The methods that the configurations and the files beside them name."""
    for part in (config, config.get_text_config(decoder=True)):
        for key in _KEYS:
            settings = getattr(part, key, None)
            method = _method(settings) if settings else _GGUF
            if method != _GGUF:
                yield method
    for name, method in _FILES.items():
        if (path / name).is_file():
            yield method or f"see {name}"


def _method(settings: Any) -> str:
    """The name of the method that a quantisation's settings, in any spelling, stand for."""
    known: Mapping[str, Any] = settings if isinstance(settings, Mapping) else vars(settings)
    if known.get("load_in_8bit") or known.get("load_in_4bit"):
        return "bitsandbytes"
    method = known.get("quant_method") or known.get("quant_algo") or known.get("mode")
    bits = known.get("bits")
    return str(method or (f"{bits} bits" if bits else "by an unnamed method"))
