"""The attention kernel of all stages: transformers' sdpa, with short cuts that repeat no KV head.

There are five cases. With one query token per sequence, the query heads that share a KV head become
queries of that head, so no grouped-query kernel is needed: on a CPU that is 5 to 30 % faster than
``enable_gqa``, and it takes masks. With a few query tokens on a CPU, in fp32 and under a mask that
is added, query heads are packed in the same way and plain products are used, because the tiles of
the fused kernel are made for more queries. With many query tokens on a CPU, or under a bool mask,
the grouped-query kernel is used, whose result equals repeating the KV heads. Passes in which
batches are joined take plain products too where these beat it: for the prompts of bf16 models on a
CPU without AMX, and for chunks of them, a block of queries at a time. In all other cases
transformers' own function runs: on a GPU a mask would send the grouped-query kernel to its slow
path (not measured here).
Shapes: B = batch, Q = query heads, H = KV heads, T = query tokens, K = entries attended to,
D = head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rayapp.models.real_tokens import RealTokens

PACKED_SDPA = "rayapp_packed_sdpa"

_FEW = 32
_QUERIES_AT_ONCE = 256
_HAS_AMX = torch.cpu._is_amx_tile_supported()

Observer = Callable[[torch.Tensor, torch.Tensor, float], None]
"""Function that receives a block's queries ``BQTD`` and keys ``BHKD``, rotated and normalised, and
the scale of their products."""

_observers: list[Observer] = []


@contextmanager
def observed_attention(observer: Observer) -> Iterator[None]:
    """Let ``observer`` see every attention that runs in this context; one thread at a time."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def attention_weights(
    query_BQTD: torch.Tensor, keys_BHKD: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Compute the attention weights ``(B, Q, T, K)``, which the kernels never form, in float32.

    Args:
        query_BQTD: Queries; those of head ``q`` read KV head ``q // (Q / H)``.
        keys_BHKD: Keys of the attended entries.
        mask: Bool mask that broadcasts to ``(B, 1, T, K)``, True = may attend; a query that may
            attend to no entry has weights of zero.
        scaling: Factor of the products.
    """
    groups = query_BQTD.shape[1] // keys_BHKD.shape[1]
    keys_BQKD = keys_BHKD.float().repeat_interleave(groups, dim=1)
    logits_BQTK = query_BQTD.float() @ keys_BQKD.transpose(2, 3) * scaling
    weights_BQTK = logits_BQTK.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights_BQTK.nan_to_num(0.0)


def packed_sdpa(
    module: torch.nn.Module,
    query_BQTD: torch.Tensor,
    keys_BHKD: torch.Tensor,
    values_BHKD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    real_tokens: RealTokens | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention outputs ``(B, T, Q, D)``; a mask, bool or added, broadcasts to ``(B, 1, T, K)``.

    With ``real_tokens``, queries and outputs are those of all batches in one row, and keys, values
    and masks are sequences with one tensor (of masks: or None) per batch.
    """
    if real_tokens is not None:
        batches = zip(
            real_tokens.heads_apart(query_BQTD),
            keys_BHKD,
            values_BHKD,
            attention_mask or [None] * len(keys_BHKD),
            strict=True,
        )
        outputs = [
            _in_query_blocks(query, keys, values, mask, scaling)
            if _pays_in_blocks(query, mask)
            else packed_sdpa(module, query, keys, values, mask, scaling=scaling, **kwargs)[0]
            for query, keys, values, mask in batches
        ]
        return real_tokens.joined(outputs), None
    for observe in _observers:
        default = query_BQTD.shape[-1] ** -0.5
        observe(query_BQTD, keys_BHKD, default if scaling is None else scaling)
    if query_BQTD.shape[2] != 1 and attention_mask is not None and not query_BQTD.is_cuda:
        if query_BQTD.shape[2] <= _FEW and attention_mask.dtype == torch.float32:
            return _few_queries(query_BQTD, keys_BHKD, values_BHKD, attention_mask, scaling), None
        attended = functional.scaled_dot_product_attention(
            query_BQTD,
            keys_BHKD,
            values_BHKD,
            attn_mask=attention_mask,
            scale=scaling,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).contiguous(), None
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


def _few_queries(
    query_BQTD: torch.Tensor,
    keys_BHKD: torch.Tensor,
    values_BHKD: torch.Tensor,
    bias: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Compute attention outputs ``(B, T, Q, D)`` with plain matrix products.

    Every query must have an entry to attend to, unlike in the fused kernels; ``bias`` broadcasts
    to ``(B, 1, T, K)``.
    """
    batch, num_heads, count, dim = query_BQTD.shape
    scale = dim**-0.5 if scaling is None else scaling
    packed_BHGD = (query_BQTD * scale).reshape(batch, keys_BHKD.shape[1], -1, dim)
    products_BHGK = packed_BHGD @ keys_BHKD.transpose(2, 3)
    products_BQTK = products_BHGK.view(batch, num_heads, count, -1).add_(bias)
    weights_BQTK = torch.softmax(products_BQTK, dim=-1)
    attended_BHGD = weights_BQTK.view(products_BHGK.shape) @ values_BHKD
    return attended_BHGD.view(batch, num_heads, count, dim).transpose(1, 2).contiguous()


def _pays_in_blocks(query_BQTD: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether plain products beat the fused kernel: for bf16 prompts, and chunks that see a prefix.

    They do on CPUs with AVX-512 (a trial over 3,000 tokens), and not on those with AMX, whose tiles
    the fused kernel uses: there it took a third of the time of plain products, with a mask too (a
    trial of chunks of 512 over 3,000 and 6,000 tokens). No benchmark of ours measures either.
    """
    pays = (
        not _observers
        and not _HAS_AMX
        and query_BQTD.device.type == "cpu"
        and query_BQTD.dtype == torch.bfloat16
        and query_BQTD.shape[2] > _QUERIES_AT_ONCE
    )
    if not pays or mask is None:
        return pays
    return mask.dtype == torch.bool and mask.shape[:2] == (1, 1) and bool(mask.any(dim=-1).all())


def _in_query_blocks(
    query_BQTD: torch.Tensor,
    keys_BHKD: torch.Tensor,
    values_BHKD: torch.Tensor,
    mask_11TK: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Attention outputs ``(B, T, Q, D)``, a block of queries at a time.

    A block reads only the entries between the first and the last that one of its queries may attend
    to. Without a mask attention is causal, and T = K.
    """
    num_tokens = query_BQTD.shape[2]
    parts = []
    for start in range(0, num_tokens, _QUERIES_AT_ONCE):
        stop = min(start + _QUERIES_AT_ONCE, num_tokens)
        if mask_11TK is None:
            first, last = 0, stop
            allowed_tK = torch.arange(stop)[None] <= torch.arange(start, stop)[:, None]
        else:
            seen = mask_11TK[0, 0, start:stop].any(dim=0).nonzero()
            first, last = int(seen[0]), int(seen[-1]) + 1
            allowed_tK = mask_11TK[0, 0, start:stop, first:last]
        bias_tK = torch.zeros(allowed_tK.shape, dtype=query_BQTD.dtype)
        bias_tK.masked_fill_(~allowed_tK, -torch.inf)
        keys, values = keys_BHKD[:, :, first:last], values_BHKD[:, :, first:last]
        query_BQtD = query_BQTD[:, :, start:stop]
        parts.append(_few_queries(query_BQtD, keys, values, bias_tK, scaling))
    return torch.cat(parts, dim=1)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
