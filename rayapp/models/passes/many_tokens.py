"""The blocks of a stage for prompts, without the machinery of modules.

All parts but attention treat tokens one by one, so they run over a thousand tokens at a time: the
memory of what lies between two products is bounded, and that of one share serves the next. Results
are those of :class:`rayapp.models.stack.BlockStack`, up to the rounding of products of other sizes.
A block that is not plain (hooks, replaced layers) runs as the module that it is.
Shapes: T = tokens of a pass, N = tokens of a share, E = hidden size, R = heads, Q = query heads,
H = KV heads, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from rayapp.models.attention import packed_sdpa
from rayapp.models.blocks import PartialBlock
from rayapp.models.healed import BRIDGE
from rayapp.models.passes.parts import Function, Rotary, is_plain, mlp_of, norm_of, rotate, signed
from rayapp.models.passes.single_token import AttendingCache
from rayapp.models.products.joined import Products, product_of
from rayapp.models.real_tokens import RealTokens
from rayapp.models.stack import BlockCache, BlockStack, Masks

TOKENS_AT_ONCE = 1024
"""Tokens of a share on a CPU, which reads weights once a share (project default; no benchmark of
ours compares sizes)."""


@dataclass(frozen=True)
class TokensThenPrompts:
    """The caches of a pass that begins with a token of each of some sequences; prompts follow.

    Args:
        num_tokens: Number of sequences.
        sequences: The cache of the sequences.
        prompts: The cache of the prompts.
    """

    num_tokens: int
    sequences: AttendingCache
    prompts: BlockCache


class ManyTokensStack:
    """Runs the blocks of ``stack`` for prompts; hooks set later are ignored."""

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        one_device = len(set(stack.devices)) == 1
        self.blocks = [
            PromptBlock(number, block) if one_device and is_plain(block) else None
            for number, block in enumerate(stack.blocks)
        ]

    @property
    def is_plain(self) -> bool:
        """True if every block runs as plain functions."""
        return None not in self.blocks

    def run(
        self,
        hidden_1TE: torch.Tensor,
        positions_1T: torch.Tensor,
        cache: BlockCache,
        masks: Masks,
        *,
        real_tokens: RealTokens,
    ) -> torch.Tensor:
        """Hidden states ``(1, T, E)`` after all blocks; the arguments of ``BlockStack.run``."""
        stack = self._stack
        rotary = stack.rotary(hidden_1TE, positions_1T)
        rows = tuple(rows_1TD[0, :, None] for rows_1TD in signed(rotary))
        hidden_1TE = hidden_1TE.clone()  # Blocks add to it in place.
        for number, block in enumerate(self.blocks):
            mask = masks.get(number)
            if block is None:
                hidden_1TE = stack.run(
                    hidden_1TE,
                    positions_1T,
                    cache,
                    {number: mask},
                    start=number,
                    stop=number + 1,
                    rotary=rotary,
                    real_tokens=real_tokens,
                )
            else:
                block.run(hidden_1TE[0], (rows[0], rows[1]), cache, mask, real_tokens)
        return hidden_1TE


class PromptBlock:
    """A plain block: what it writes, attends to and adds."""

    def __init__(self, number: int, block: Any) -> None:
        self._number = number
        mode = block.mode if isinstance(block, PartialBlock) else None
        self._writes_kv = mode is None or mode.writes_kv
        self._attends = mode is None or mode.attends
        has_mlp = mode is None or mode.has_mlp
        if self._writes_kv:
            self._read_attention(block.input_layernorm, block.self_attn)
        self._mlp = mlp_of(block.post_attention_layernorm, block.mlp) if has_mlp else None
        self._bridge: nn.Module | None = block._modules.get(BRIDGE)

    def _read_attention(self, norm_module: Any, attention: Any) -> None:
        names = ("q_proj", "k_proj", "v_proj") if self._attends else ("k_proj", "v_proj")
        layers = [getattr(attention, name) for name in names]
        self._norm, self._dim = norm_of(norm_module), attention.head_dim
        self._products = Products(layers)
        self._heads = [layer.out_features // self._dim for layer in layers]
        self._head_norms = [
            _norm_or_none(attention, name) for name in ("q_norm", "k_norm")[-len(layers) + 1 :]
        ]
        self._output = product_of(attention.o_proj) if self._attends else None
        self._attention = attention

    def run(
        self,
        hidden_TE: torch.Tensor,
        rotary: Rotary,
        cache: BlockCache | TokensThenPrompts,
        mask: Any,
        real_tokens: RealTokens,
    ) -> None:
        """Add to the hidden states of a pass what the block adds."""
        attended_TQD = None
        if self._writes_kv:
            heads = self._heads_of(hidden_TE, rotary)
            if isinstance(cache, TokensThenPrompts):
                first, prompts = cache.num_tokens, cache.prompts
                tokens_BQD = self._of_sequences([h[0, :, :first] for h in heads], cache.sequences)
                heads = [heads_1RTD[:, :, first:] for heads_1RTD in heads]
                prompts_TQD = self._of_prompts(heads, prompts, mask, real_tokens)
                assert prompts_TQD is not None
                attended_TQD = torch.cat((tokens_BQD, prompts_TQD))
            else:
                attended_TQD = self._of_prompts(heads, cache, mask, real_tokens)
        for share in _shares(hidden_TE):
            part_NE = hidden_TE[share]
            if attended_TQD is not None and self._output is not None:
                part_NE += self._output(attended_TQD[share].reshape(len(part_NE), -1))
            if self._mlp is not None:
                part_NE += self._mlp(part_NE)
            if self._bridge is not None:
                part_NE.copy_(self._bridge(part_NE))

    def _of_prompts(
        self, heads: list[torch.Tensor], cache: BlockCache, mask: Any, real_tokens: RealTokens
    ) -> torch.Tensor | None:
        """Take the KV ``(1, H, T, D)`` of prompts; attend ``(T, Q, D)`` if the block does."""
        *queries, keys, values = heads
        attended_keys, attended_values = cache.update(keys, values, self._number)
        if not self._attends:
            return None
        attended_1TQD, _ = packed_sdpa(
            self._attention,
            queries[0],
            attended_keys,
            attended_values,
            mask,
            scaling=self._attention.scaling,
            real_tokens=real_tokens,
        )
        return attended_1TQD[0]

    def _of_sequences(self, heads: list[torch.Tensor], cache: AttendingCache) -> torch.Tensor:
        """Take the KV ``(H, B, D)`` of a token of every sequence; attend ``(B, Q, D)``."""
        query_BQD, keys_BHD, values_BHD = (heads_RBD.transpose(0, 1) for heads_RBD in heads)
        batch, num_keys, dim = keys_BHD.shape
        attended_BHGD = cache.attend(
            query_BQD.reshape(batch, num_keys, -1, dim),
            keys_BHD[:, :, None],
            values_BHD[:, :, None],
            self._number,
            self._attention.scaling,
        )
        return attended_BHGD.reshape(batch, -1, dim)

    def _heads_of(self, hidden_TE: torch.Tensor, rotary: Rotary) -> list[torch.Tensor]:
        """Queries (if the block attends), keys and values ``(1, R, T, D)``, rotated."""
        made = [hidden_TE.new_empty((len(hidden_TE), num, self._dim)) for num in self._heads]
        for share in _shares(hidden_TE):
            joined_NRD = self._products.side_by_side(self._norm(hidden_TE[share]))
            *rotated, values_NHD = joined_NRD.view(len(joined_NRD), -1, self._dim).split(
                self._heads, dim=1
            )
            made[-1][share] = values_NHD
            turns = rotary[0][share], rotary[1][share]
            for heads_TRD, heads_NRD, norm in zip(made, rotated, self._head_norms, strict=False):
                heads_TRD[share] = rotate(heads_NRD if norm is None else norm(heads_NRD), turns)
        return [heads_TRD[None].transpose(1, 2) for heads_TRD in made]


def _norm_or_none(attention: Any, name: str) -> Function | None:
    norm = getattr(attention, name, None)
    return None if norm is None else norm_of(norm)


def _shares(hidden_TE: torch.Tensor) -> Iterator[slice]:
    """The tokens of a pass in equal shares of at most :data:`TOKENS_AT_ONCE`; in one on a GPU."""
    num_tokens = len(hidden_TE)
    num_shares = -(-num_tokens // TOKENS_AT_ONCE) if hidden_TE.device.type == "cpu" else 1
    bounds = [num_tokens * share // num_shares for share in range(num_shares + 1)]
    return (slice(*pair) for pair in pairwise(bounds))
