"""The blocks of a stage for one token per sequence, without the machinery of modules.

Decoding small batches is bound by Python: a call of a module costs more than the product inside it.
Here a block is a few functions over the same parameters, with the same operations in the same
order, so results are those of :class:`rayapp.models.stack.BlockStack` where weights are plain;
joined and packed products (:mod:`rayapp.models.products`) round otherwise. A block that is not
plain (hooks, replaced layers, a mode that only writes KV) runs as the module that it is.
Shapes: B = sequences, E = hidden size, Q = query heads, H = KV heads, G = query
heads per KV head, D = head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rayapp.models.blocks import PartialBlock
from rayapp.models.healed import BRIDGE
from rayapp.models.passes.parts import Rotary, is_plain, mlp_of, norm_of, rotate, signed
from rayapp.models.products.joined import Products, product_of
from rayapp.models.stack import BlockCache, BlockStack


class AttendingCache(ABC, BlockCache):
    """A cache that attends by itself, because it knows how its entries lie."""

    @abstractmethod
    def attend(
        self,
        query_BHGD: torch.Tensor,
        keys_BH1D: torch.Tensor,
        values_BH1D: torch.Tensor,
        block: int,
        scale: float,
    ) -> torch.Tensor:
        """Take the new entries of ``block``; return attention outputs ``(B, H, G, D)``."""


Masks = Mapping[int, torch.Tensor | None]
Block = Callable[[torch.Tensor, Rotary, torch.Tensor | None, BlockCache], torch.Tensor]


class SingleTokenStack:
    """Runs the blocks of ``stack`` for one token per sequence; hooks set later are ignored."""

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        self._rotary = stack.rotary
        blocks = [_plain_block(number, block) for number, block in enumerate(stack.blocks)]
        plain = None not in blocks and len(set(stack.devices)) == 1
        self.blocks = [block for block in blocks if block] if plain else None

    @property
    def is_plain(self) -> bool:
        """True if every block runs as plain functions."""
        return self.blocks is not None

    def run(
        self,
        hidden_B1E: torch.Tensor,
        positions_B1: torch.Tensor,
        cache: BlockCache,
        masks: Masks,
    ) -> torch.Tensor:
        """Hidden states ``(B, 1, E)`` after all blocks; the arguments of ``BlockStack.run``."""
        if self.blocks is None:
            return self._stack.run(hidden_B1E, positions_B1, cache, masks)
        rotary = signed(self._rotary(hidden_B1E, positions_B1))
        hidden_B1E = hidden_B1E.clone()  # Blocks add to it in place.
        for number, block in enumerate(self.blocks):
            hidden_B1E = block(hidden_B1E, rotary, masks.get(number), cache)
        return hidden_B1E


def _plain_block(number: int, block: nn.Module) -> Block | None:
    """Return ``block`` as a function, None if it must be called as a module."""
    mode = block.mode if isinstance(block, PartialBlock) else None
    if not is_plain(block) or (mode is not None and mode.writes_kv and not mode.attends):
        return None
    attends, has_mlp = mode is None or mode.attends, mode is None or mode.has_mlp
    attention = _attention(number, block.input_layernorm, block.self_attn) if attends else None
    mlp = mlp_of(block.post_attention_layernorm, block.mlp) if has_mlp else None
    bridge = block._modules.get(BRIDGE)
    if bridge is not None:
        return lambda hidden_B1E, *_: bridge.forward(hidden_B1E)

    def run(
        hidden_B1E: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None, cache: BlockCache
    ) -> torch.Tensor:
        if attention is not None:
            hidden_B1E.add_(attention(hidden_B1E, rotary, mask, cache))
        return hidden_B1E if mlp is None else hidden_B1E.add_(mlp(hidden_B1E))

    return run


def _attention(number: int, norm_module: Any, attention: Any) -> Block:
    norm, dim = norm_of(norm_module), attention.head_dim
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    products, output = Products(layers), product_of(attention.o_proj)
    norms = (
        (norm_of(attention.q_norm), norm_of(attention.k_norm))
        if hasattr(attention, "q_norm")
        else None
    )
    num_queries, scale = attention.q_proj.out_features // dim, attention.scaling
    num_heads = attention.k_proj.out_features // dim
    num_rotated = num_queries + num_heads

    def run(
        hidden_B1E: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None, cache: BlockCache
    ) -> torch.Tensor:
        batch = hidden_B1E.shape[0]
        joined_BRD = products.side_by_side(norm(hidden_B1E)).view(batch, -1, dim)
        rotated_BRD = joined_BRD[:, :num_rotated]
        if norms is not None:
            query_BQD, key_BHD = rotated_BRD[:, :num_queries], rotated_BRD[:, num_queries:]
            rotated_BRD = torch.cat((norms[0](query_BQD), norms[1](key_BHD)), dim=1)
        # Queries and keys are rotated together: one set of small operations instead of two.
        rotated_BRD = rotate(rotated_BRD, rotary)
        grouped_BHGD = rotated_BRD[:, :num_queries].reshape(batch, num_heads, -1, dim)
        new_keys_BH1D = rotated_BRD[:, num_queries:, None]
        new_values_BH1D = joined_BRD[:, num_rotated:, None]
        attended_BHGD = _attended(
            cache, grouped_BHGD, new_keys_BH1D, new_values_BH1D, number, mask, scale
        )
        return output(attended_BHGD.reshape(batch, 1, -1))

    return run


def _attended(
    cache: BlockCache,
    query_BHGD: torch.Tensor,
    keys_BH1D: torch.Tensor,
    values_BH1D: torch.Tensor,
    block: int,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    if isinstance(cache, AttendingCache):
        return cache.attend(query_BHGD, keys_BH1D, values_BH1D, block, scale)
    keys_BHKD, values_BHKD = cache.update(keys_BH1D, values_BH1D, block)
    return functional.scaled_dot_product_attention(
        query_BHGD, keys_BHKD, values_BHKD, attn_mask=mask, scale=scale
    )
