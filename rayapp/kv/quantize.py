"""Encodings that only the transfer uses: symmetric int8 and int4, decoded before decode attends.

Keys are scaled per channel (their outliers sit in fixed channels), values per token, both per KV
head (KIVI, arXiv:2402.02750, measured that this split loses least; the bit layout is ours). Keys
share a scale within fixed groups of ``KEY_GROUP`` kept entries, counted from the first; so entries
from one border of groups to another are encoded alike whether they are sent alone or with all
others (:mod:`rayapp.kv.parts`). Scales travel as float16 and count as bytes. Shapes: H = KV heads,
N = entries, G = groups of entries (the last may be short), D = head dimension.

Error bound: with ``s`` the scale used, every decoded number lies within ``s / 2`` of its original,
plus the rounding of the model's own type. ``s`` is the largest magnitude of the channel in its
group (keys) or of the token (values) over 127 (int8) or 7 (int4), rounded to float16, and at least
``MIN_SCALE``; an all-zero group decodes to exact zeros.
"""

from __future__ import annotations

import torch

from rayapp.errors import TransferError
from rayapp.plan import KEY_GROUP, Encoding

LEVELS: dict[Encoding, int] = {"int8": 127, "int4": 7}
SCALE_DTYPE = torch.float16
MIN_SCALE = 2.0**-16  # Below it float16 is so coarse that a rounded scale could overflow codes.
_MAX_SCALE = torch.finfo(SCALE_DTYPE).max


def num_groups(num_entries: int) -> int:
    """Number of groups of a block with so many kept entries: G."""
    return -(-num_entries // KEY_GROUP)


def buffer_sizes(
    encoding: Encoding, num_kv_heads: int, num_entries: int, head_dim: int, element_bytes: int
) -> tuple[int, ...]:
    """Number of bytes of every buffer of one block, in the order in which buffers travel.

    The encoding ``model`` has two buffers: keys, values. The others have four: key codes, key
    scales, value codes, value scales. A block without entries has buffers of 0 bytes, also for
    scales.
    """
    numbers = num_kv_heads * num_entries * head_dim
    if encoding == "model":
        return (numbers * element_bytes,) * 2
    codes = numbers if encoding == "int8" else (numbers + 1) // 2
    key_scales = num_kv_heads * num_groups(num_entries) * head_dim
    value_scales = num_kv_heads * num_entries
    return codes, key_scales * SCALE_DTYPE.itemsize, codes, value_scales * SCALE_DTYPE.itemsize


def encode(
    keys_HND: torch.Tensor, values_HND: torch.Tensor, encoding: Encoding
) -> tuple[torch.Tensor, ...]:
    """Encode one block as buffers in the order of :func:`buffer_sizes`, on the tensors' device.

    Raises:
        TransferError: Numbers are not finite, or too large for a float16 scale.
    """
    if encoding == "model":
        return keys_HND, values_HND
    key_codes, key_scales = _quantize_keys(keys_HND, encoding)
    value_codes, value_scales = _quantize_values(values_HND, encoding)
    pack = _pack_nibbles if encoding == "int4" else torch.Tensor.contiguous
    return pack(key_codes), key_scales, pack(value_codes), value_scales


def decode(
    buffers: tuple[torch.Tensor, ...],
    encoding: Encoding,
    shape_HND: tuple[int, int, int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the flat or shaped buffers of one block to ``(keys_HND, values_HND)`` in ``dtype``."""
    if encoding == "model":
        keys, values = buffers
        return keys.view(shape_HND), values.view(shape_HND)
    heads, entries, dim = shape_HND
    if not entries:
        return torch.empty(shape_HND, dtype=dtype), torch.empty(shape_HND, dtype=dtype)
    key_codes, key_scales, value_codes, value_scales = buffers
    if encoding == "int4":
        numbers = heads * entries * dim
        key_codes, value_codes = (
            _unpack_nibbles(key_codes, numbers),
            _unpack_nibbles(value_codes, numbers),
        )
    key_scales_HGD = key_scales.view(heads, num_groups(entries), dim)
    key_scales_HND = _of_entries(key_scales_HGD, entries)
    return (
        _dequantize(key_codes.view(shape_HND), key_scales_HND, dtype),
        _dequantize(value_codes.view(shape_HND), value_scales.view(heads, entries, 1), dtype),
    )


def round_trip(
    keys_BHND: torch.Tensor, values_BHND: torch.Tensor, encoding: Encoding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode and decode: the result equals the received KV bit for bit; any leading dimensions."""
    if encoding == "model" or not keys_BHND.shape[-2]:
        return keys_BHND, values_BHND
    key_codes, key_scales_BHGD = _quantize_keys(keys_BHND, encoding)
    key_scales_BHND = _of_entries(key_scales_BHGD, keys_BHND.shape[-2])
    keys = _dequantize(key_codes, key_scales_BHND, keys_BHND.dtype)
    values = _dequantize(*_quantize_values(values_BHND, encoding), values_BHND.dtype)
    return keys, values


def _quantize_keys(keys: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes ``(..., N, D)`` and float16 scales ``(..., G, D)``."""
    exact, missing = keys.float(), -keys.shape[-2] % KEY_GROUP
    # Zeros that fill the last group up never raise its largest magnitude.
    filled = torch.nn.functional.pad(exact.abs(), (0, 0, 0, missing))
    scales = _scales(filled.unflatten(-2, (num_groups(keys.shape[-2]), KEY_GROUP)), encoding, -2)
    return _codes(exact, _of_entries(scales.squeeze(-2), keys.shape[-2])), scales.squeeze(-2)


def _quantize_values(values: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes ``(..., N, D)`` and float16 scales ``(..., N, 1)``."""
    exact = values.float()
    scales = _scales(exact.abs(), encoding, -1)
    return _codes(exact, scales), scales


def _scales(magnitudes: torch.Tensor, encoding: Encoding, dim: int) -> torch.Tensor:
    """Return float16 scales, each of all numbers along ``dim``, which stays with length 1."""
    levels = LEVELS[encoding]
    largest = magnitudes.amax(dim=dim, keepdim=True)
    peak = float(largest.max()) if largest.numel() else 0.0
    if not peak / levels <= _MAX_SCALE:
        raise TransferError(
            f"KV of magnitude {peak} cannot be sent as {encoding}: scales end at {_MAX_SCALE:g}; "
            f"send this block with encoding model"
        )
    return (largest / levels).clamp(min=MIN_SCALE).to(SCALE_DTYPE)


def _of_entries(scales: torch.Tensor, num_entries: int) -> torch.Tensor:
    """Repeat the scales ``(..., G, D)`` of groups for their entries, ``(..., N, D)``."""
    return scales.repeat_interleave(KEY_GROUP, dim=-2)[..., :num_entries, :]


def _codes(exact: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (exact / scales.float()).round_().to(torch.int8)


def _dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.float() * scales.float()).to(dtype)


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes in -7..7 as offset nibbles, two per byte, the earlier one low; pad an odd end."""
    nibbles = (codes.flatten() + 8).to(torch.uint8)
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _unpack_nibbles(packed: torch.Tensor, numbers: int) -> torch.Tensor:
    nibbles = torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten()[:numbers]
    return nibbles.to(torch.int8) - 8
