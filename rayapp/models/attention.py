"""Attention as the stages run it: transformers' sdpa, with a short cut for one query token.

With one query token per sequence, the query heads that share a KV head become queries of that head,
so no key or value is repeated and no grouped-query kernel is needed: on a CPU 5 to 30 % faster than
``enable_gqa``, and masks are welcome.
Shapes: B = batch, Q = query heads, H = KV heads, T = query tokens, K = entries attended to,
D = head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED_SDPA = "rayapp_packed_sdpa"


def packed_sdpa(
    module: torch.nn.Module,
    query_BQTD: torch.Tensor,
    keys_BHKD: torch.Tensor,
    values_BHKD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention outputs ``(B, T, Q, D)``; a bool mask broadcasts to ``(B, 1, T, K)``."""
    if query_BQTD.shape[2] != 1:
        return sdpa_attention_forward(
            module, query_BQTD, keys_BHKD, values_BHKD, attention_mask, scaling=scaling, **kwargs
        )
    batch, num_heads, _, dim = query_BQTD.shape
    attended = functional.scaled_dot_product_attention(
        query_BQTD.reshape(batch, keys_BHKD.shape[1], -1, dim),
        keys_BHKD,
        values_BHKD,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return attended.reshape(batch, 1, num_heads, dim), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
