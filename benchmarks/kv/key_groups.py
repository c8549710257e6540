"""KV after an encoding whose keys share scales in groups of any size.

Shapes: B = prompts of equal length, H = KV heads, N = entries, D = head dimension.
"""

from __future__ import annotations

import torch

from rayapp.kv.cache import Prefix, PrefixCache
from rayapp.kv.ledger import KVShape
from rayapp.kv.quantize import LEVELS, MIN_SCALE, SCALE_DTYPE, buffer_sizes, num_groups, round_trip
from rayapp.plan import Encoding


def in_groups(full: PrefixCache, encoding: Encoding, size: int) -> PrefixCache:
    """The KV of a batch as it would arrive if ``size`` entries shared scales of keys."""
    prefixes = {}
    for block, prefix in full.prefixes.items():
        _, values = round_trip(prefix.keys_BHND, prefix.values_BHND, encoding)
        keys = torch.cat(
            [_one_group(keys, encoding) for keys in prefix.keys_BHND.split(size, dim=2)], dim=2
        )
        prefixes[block] = Prefix(keys, values, prefix.positions)
    return PrefixCache(prefixes, full.windows)


def _one_group(keys_BHND: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """Keys that share one scale per channel; up to the chosen size equal to what is sent."""
    levels, exact = LEVELS[encoding], keys_BHND.float()
    largest = exact.abs().amax(dim=2, keepdim=True)
    scales = (largest / levels).clamp(min=MIN_SCALE).to(SCALE_DTYPE).float()
    return ((exact / scales).round() * scales).to(keys_BHND.dtype)


def encoded_bytes(shape: KVShape, encoding: Encoding, size: int, num_entries: int) -> int:
    """Bytes of codes and scales of all blocks with so many entries."""
    heads, dim = shape.num_kv_heads, shape.head_dim
    usual = sum(buffer_sizes(encoding, heads, num_entries, dim, shape.element_bytes))
    more = -(-num_entries // size) - num_groups(num_entries)
    return shape.num_blocks * (usual + more * heads * dim * SCALE_DTYPE.itemsize)
