"""Weights in the types of GGUF files: what becomes of a weight that was written so.

A block of 32 neighbours in a row shares a scale in float16; in Q4_1 it has a minimum too, and 4
bits for each weight, in Q8_0 it has 8 bits for each.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from rayapp.errors import InputError
from rayapp.models.blocks import decoder_blocks
from rayapp.models.formats.gguf import gguf_package

QuantType = Literal["Q4_0", "Q4_1", "Q5_1", "Q8_0"]
"""Types in blocks of 32; llama.cpp's files named Q4_1 have embeddings in Q8_0."""

BLOCK = 32
"""Weights that share a scale; a row must be a multiple of it."""


def through(weights_OI: torch.Tensor, kind: QuantType) -> torch.Tensor:
    """Write weights in a type of GGUF and read them again, as llama.cpp does.

    The arithmetic is that of package ``gguf``, llama.cpp's own.

    Args:
        weights_OI: Weights of any floating type, output by input, inputs a multiple of 32.
        kind: The type.

    Returns:
        The weights in the type and shape of ``weights_OI``.

    Raises:
        InputError: Package ``gguf`` is missing, or a row cannot be cut into blocks.
    """
    gguf = gguf_package()
    if weights_OI.shape[-1] % BLOCK:
        raise InputError(
            f"rows of {weights_OI.shape[-1]} weights cannot be cut into blocks of {BLOCK}; choose "
            "a model whose sizes are multiples of it"
        )
    quant_type = gguf.GGMLQuantizationType[kind]
    values = weights_OI.detach().float().cpu().contiguous().numpy()
    read = torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(values, quant_type), quant_type)
    )
    return read.to(dtype=weights_OI.dtype, device=weights_OI.device)


@torch.no_grad()
def quantise(model: PreTrainedModel, kind: QuantType = "Q4_1") -> None:
    """Round all weights of a model, in place, as a file of llama.cpp of this name holds them.

    Products of the blocks are rounded to ``kind``, embeddings and head to Q8_0; norms and biases
    stay as they are.

    Raises:
        InputError: See :func:`through`.
    """
    for module in decoder_blocks(model).modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(through(module.weight, kind))
    ends = {id(end): end for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = {id(end.weight): end.weight for end in ends.values()}  # tied ends are rounded once
    for weight in weights.values():
        weight.copy_(through(weight, "Q8_0"))
