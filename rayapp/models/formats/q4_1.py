"""Weights in Q4_1, as GGUF files hold them: what becomes of a weight that was written so.

A block of 32 neighbours in a row has a scale and a minimum in float16, and 4 bits for each weight.
"""

from __future__ import annotations

import torch

from rayapp.errors import InputError
from rayapp.models.formats.gguf import gguf_package

BLOCK = 32
"""Weights that share a scale and a minimum; a row must be a multiple of it."""


def through_q4_1(weights_OI: torch.Tensor) -> torch.Tensor:
    """Write weights in Q4_1 and read them again, as llama.cpp does.

    The arithmetic is that of package ``gguf``, llama.cpp's own.

    Args:
        weights_OI: Weights of any floating type, output by input, inputs a multiple of 32.

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
    kind = gguf.GGMLQuantizationType.Q4_1
    packed = gguf.quants.quantize(weights_OI.detach().float().cpu().contiguous().numpy(), kind)
    read = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    return read.to(dtype=weights_OI.dtype, device=weights_OI.device)
