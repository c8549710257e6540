"""The blocks of a stage for one token per sequence, without the machinery of modules.

Decoding small batches is bound by Python: a call of a module costs more than the product inside it.
Here a block is a few functions over the same parameters, with the same operations in the same
order, so results are those of :class:`rayapp.models.stack.BlockStack`. A block that is not plain
(hooks, replaced layers, a mode that only writes KV) runs as the module that it is.
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
Rotary = tuple[torch.Tensor, torch.Tensor]
Block = Callable[[torch.Tensor, Rotary, torch.Tensor | None, BlockCache], torch.Tensor]


class SingleTokenStack:
    """Runs the blocks of ``stack`` for one token per sequence; hooks set later are ignored."""

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        self._rotary = stack.rotary
        blocks = [_plain_block(number, block) for number, block in enumerate(stack.blocks)]
        plain = None not in blocks and len(set(stack.devices)) == 1
        self._blocks = [block for block in blocks if block] if plain else None

    @property
    def is_plain(self) -> bool:
        """True if every block runs as plain functions."""
        return self._blocks is not None

    def run(
        self,
        hidden_B1E: torch.Tensor,
        positions_B1: torch.Tensor,
        cache: BlockCache,
        masks: Masks,
    ) -> torch.Tensor:
        """Hidden states ``(B, 1, E)`` after all blocks; the arguments of ``BlockStack.run``."""
        if self._blocks is None:
            return self._stack.run(hidden_B1E, positions_B1, cache, masks)
        rotary = self._rotary(hidden_B1E, positions_B1)
        for number, block in enumerate(self._blocks):
            hidden_B1E = block(hidden_B1E, rotary, masks.get(number), cache)
        return hidden_B1E


def _plain_block(number: int, block: nn.Module) -> Block | None:
    """Return ``block`` as a function, None if it must be called as a module."""
    if any(_is_hooked(module) for module in block.modules()):
        return None
    linears = [module for name, module in block.named_modules() if name.endswith("_proj")]
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    mode = block.mode if isinstance(block, PartialBlock) else None
    if mode is not None and mode.writes_kv and not mode.attends:
        return None
    attends, has_mlp = mode is None or mode.attends, mode is None or mode.has_mlp
    attention = _attention(number, block.input_layernorm, block.self_attn) if attends else None
    mlp = _mlp(block.post_attention_layernorm, block.mlp) if has_mlp else None
    bridge = block._modules.get(BRIDGE)
    if bridge is not None:
        return lambda hidden_B1E, *_: bridge.forward(hidden_B1E)

    def run(
        hidden_B1E: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None, cache: BlockCache
    ) -> torch.Tensor:
        if attention is not None:
            hidden_B1E = hidden_B1E + attention(hidden_B1E, rotary, mask, cache)
        return hidden_B1E if mlp is None else hidden_B1E + mlp(hidden_B1E)

    return run


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the RMS norm of a module as a function, which all supported families share."""
    weight_E, epsilon = module.weight, module.variance_epsilon

    def norm(x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return weight_E * (wide * torch.rsqrt(variance + epsilon)).to(x.dtype)

    return norm


def _mlp(norm_module: Any, mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    norm, act, linear = _norm(norm_module), mlp.act_fn, functional.linear
    gate, up, down = (_parameters(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def run(hidden_B1E: torch.Tensor) -> torch.Tensor:
        normed_B1E = norm(hidden_B1E)
        return linear(act(linear(normed_B1E, *gate)) * linear(normed_B1E, *up), *down)

    return run


def _attention(number: int, norm_module: Any, attention: Any) -> Block:
    norm, linear, dim = _norm(norm_module), functional.linear, attention.head_dim
    query, key, value, output = (
        _parameters(getattr(attention, f"{name}_proj")) for name in ("q", "k", "v", "o")
    )
    norms = (
        (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
    )
    num_queries, scale = query[0].shape[0] // dim, attention.scaling

    def run(
        hidden_B1E: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None, cache: BlockCache
    ) -> torch.Tensor:
        batch = hidden_B1E.shape[0]
        normed_B1E = norm(hidden_B1E)
        query_BQD = linear(normed_B1E, *query).view(batch, num_queries, dim)
        key_BHD = linear(normed_B1E, *key).view(batch, -1, dim)
        if norms is not None:
            query_BQD, key_BHD = norms[0](query_BQD), norms[1](key_BHD)
        # Queries and keys are rotated together: one set of small operations instead of two.
        rotated_BRD = _rotate(torch.cat((query_BQD, key_BHD), dim=1), rotary)
        grouped_BHGD = rotated_BRD[:, :num_queries].reshape(batch, key_BHD.shape[1], -1, dim)
        new_keys_BH1D = rotated_BRD[:, num_queries:, None]
        new_values_BH1D = linear(normed_B1E, *value).view(batch, -1, 1, dim)
        attended_BHGD = _attended(
            cache, grouped_BHGD, new_keys_BH1D, new_values_BH1D, number, mask, scale
        )
        return linear(attended_BHGD.reshape(batch, 1, -1), *output)

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


def _rotate(x_BRD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Apply rotary positions as all supported families do; cosine and sine ``(B or 1, 1, D)``."""
    cos_B1D, sin_B1D = rotary
    one_BRD, two_BRD = x_BRD.chunk(2, dim=-1)
    return x_BRD * cos_B1D + torch.cat((-two_BRD, one_BRD), dim=-1) * sin_B1D


def _parameters(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear.weight, linear.bias
