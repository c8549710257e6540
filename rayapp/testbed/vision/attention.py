"""Attention for training on a CPU: plain matrix products, which bf16 makes twice as fast.

torch's fused attention computes in fp32 on a CPU. The results are the same: a test compares packed
rows with single prompts under the attention that transformers uses by itself.

Shapes: B = rows, N = visual tokens, Q = tokens of questions, T = N + Q, H = heads, d = head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, LlavaForConditionalGeneration

_PACKED = "rayapp_packed_questions"
_PLAIN = "rayapp_plain"
_CHUNK = 192


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    return (query @ key.mT + mask).softmax(dim=-1) @ value


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    question_mask: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows, in plain matrix products.

    Visual tokens attend causally among themselves, a chunk of queries to the keys up to its end;
    questions attend by ``question_mask``, ``(B, 1, Q, T)``. There is no cache.
    """
    del module, attention_mask
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query = query * scaling
    num_visual = question_mask.shape[-1] - question_mask.shape[-2]
    mixed = []
    for start in range(0, num_visual, _CHUNK):
        stop = min(start + _CHUNK, num_visual)
        causal = torch.full((stop - start, stop), -torch.inf, dtype=query.dtype).triu(start + 1)
        mixed.append(_attend(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], causal))
    mixed.append(_attend(query[:, :, num_visual:], key, value, question_mask.to(query.dtype)))
    return torch.cat(mixed, dim=2).transpose(1, 2), None


def plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention without a mask, for the vision tower."""
    del module, attention_mask
    mixed = (query * scaling @ key.mT).softmax(dim=-1) @ value
    return mixed.transpose(1, 2), None


AttentionInterface.register(_PACKED, packed_attention)
AttentionInterface.register(_PLAIN, plain_attention)


def attend_packed(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Let a model attend as training does: packed rows in its language model, no cache."""
    model.model.vision_tower.set_attn_implementation(_PLAIN)
    model.model.language_model.set_attn_implementation(_PACKED)
    return model
