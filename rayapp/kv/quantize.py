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

import math
from collections.abc import Iterator, Sequence

import torch

from rayapp.errors import TransferError
from rayapp.plan import KEY_GROUP, Encoding

LEVELS: dict[Encoding, int] = {"int8": 127, "int4": 7}
SCALE_DTYPE = torch.float16
MIN_SCALE = 2.0**-16  # Below it float16 is so coarse that a rounded scale could overflow codes.
_MAX_SCALE = torch.finfo(SCALE_DTYPE).max
_PIECE = 1 << 17  # Numbers that are encoded at once on a CPU: their work space fits its caches.


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
    key_codes, key_scales = _quantize(keys_HND, encoding, of_keys=True)
    value_codes, value_scales = _quantize(values_HND, encoding, of_keys=False)
    if encoding == "int4":
        key_codes, value_codes = _pack_nibbles(key_codes), _pack_nibbles(value_codes)
    return key_codes, key_scales, value_codes, value_scales


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
    value_scales_HN1 = value_scales.view(heads, entries, 1)
    return (
        _dequantize(key_codes.view(shape_HND), key_scales_HGD, dtype, of_keys=True),
        _dequantize(value_codes.view(shape_HND), value_scales_HN1, dtype, of_keys=False),
    )


def round_trip(
    keys_BHND: torch.Tensor, values_BHND: torch.Tensor, encoding: Encoding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode and decode: the result equals the received KV bit for bit; any leading dimensions."""
    if encoding == "model" or not keys_BHND.shape[-2]:
        return keys_BHND, values_BHND
    keys, values = (
        _dequantize(*_quantize(numbers, encoding, of_keys=of_keys), numbers.dtype, of_keys=of_keys)
        for numbers, of_keys in ((keys_BHND, True), (values_BHND, False))
    )
    return keys, values


def _pieces(
    numbers: torch.Tensor, num_works: int = 1
) -> Iterator[tuple[slice, Sequence[torch.Tensor]]]:
    """Slices of the entries of ``(..., N, D)``, a whole number of groups each, with work spaces.

    A work space is float32 and has room for whole groups. It is the same memory for all slices: on
    a CPU, fresh memory for every step of every block costs more than the arithmetic.
    """
    *leading, num_entries, dim = numbers.shape
    row = max(math.prod(leading) * dim, 1)
    most = num_entries if numbers.is_cuda else _PIECE // row
    step = max(most // KEY_GROUP, 1) * KEY_GROUP
    room = min(step, num_groups(num_entries) * KEY_GROUP)
    works = torch.empty((num_works, room * row), dtype=torch.float32, device=numbers.device)
    for start in range(0, num_entries, step):
        stop = min(start + step, num_entries)
        filled = num_groups(stop - start) * KEY_GROUP
        shape = (*leading, filled, dim)
        yield slice(start, stop), [work[: filled * row].view(shape) for work in works]


def _quantize(
    numbers: torch.Tensor, encoding: Encoding, *, of_keys: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes ``(..., N, D)`` and float16 scales, ``(..., G, D)`` or ``(..., N, 1)``."""
    *leading, num_entries, dim = numbers.shape
    codes = torch.empty(numbers.shape, dtype=torch.int8, device=numbers.device)
    shape = (num_groups(num_entries), dim) if of_keys else (num_entries, 1)
    scales = torch.empty((*leading, *shape), dtype=SCALE_DTYPE, device=numbers.device)
    for entries, (work, magnitudes) in _pieces(numbers, 2):
        count = entries.stop - entries.start
        exact = work[..., :count, :]
        exact.copy_(numbers[..., entries, :])
        # Zeros never raise a largest magnitude, so scales are those of the entries alone.
        work[..., count:, :].zero_()
        torch.abs(work, out=magnitudes)
        if of_keys:
            used = _scales(_grouped(magnitudes).amax(dim=-2), encoding)
            _grouped(work).div_(used.unsqueeze(-2).float())
            scales[..., _groups(entries), :].copy_(used)
        else:
            used = _scales(magnitudes[..., :count, :].amax(dim=-1, keepdim=True), encoding)
            exact.div_(used.float())
            scales[..., entries, :].copy_(used)
        codes[..., entries, :].copy_(exact.round_())
    return codes, scales


def _scales(largest: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """Scales of numbers with these largest magnitudes."""
    levels = LEVELS[encoding]
    peak = float(largest.max()) if largest.numel() else 0.0
    if not peak / levels <= _MAX_SCALE:
        raise TransferError(
            f"KV of magnitude {peak} cannot be sent as {encoding}: scales end at {_MAX_SCALE:g}; "
            f"send this block with encoding model"
        )
    return (largest / levels).clamp(min=MIN_SCALE).to(SCALE_DTYPE)


def _dequantize(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, *, of_keys: bool
) -> torch.Tensor:
    """The inverse of :func:`_quantize`, in ``dtype``."""
    numbers = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for entries, (work,) in _pieces(codes):
        exact = work[..., : entries.stop - entries.start, :]
        exact.copy_(codes[..., entries, :])
        if of_keys:
            _grouped(work).mul_(scales[..., _groups(entries), :].unsqueeze(-2).float())
        else:
            exact.mul_(scales[..., entries, :].float())
        numbers[..., entries, :].copy_(exact)
    return numbers


def _grouped(whole: torch.Tensor) -> torch.Tensor:
    """Numbers ``(..., G * KEY_GROUP, D)`` as ``(..., G, KEY_GROUP, D)``."""
    return whole.unflatten(-2, (-1, KEY_GROUP))


def _groups(entries: slice) -> slice:
    """The groups of entries from one border of groups to another, or to the end."""
    return slice(entries.start // KEY_GROUP, num_groups(entries.stop))


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes in -7..7 as offset nibbles, two per byte, the earlier one low; pad an odd end.

    The codes are changed.
    """
    nibbles = codes.flatten().add_(8).view(torch.uint8)
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return (nibbles[1::2] << 4).bitwise_or_(nibbles[0::2])


def _unpack_nibbles(packed: torch.Tensor, numbers: int) -> torch.Tensor:
    nibbles = packed.new_empty(2 * packed.numel())
    nibbles[0::2].copy_(packed & 0x0F)
    nibbles[1::2].copy_(packed >> 4)
    return nibbles[:numbers].view(torch.int8).sub_(8)
