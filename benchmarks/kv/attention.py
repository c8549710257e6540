"""The attention of prefill over a prompt, which rules per prompt choose by.

Shapes: B = prompts of equal length, Q = query heads, H = KV heads, W = tokens of the window, T =
prompt tokens that prefill ran, N = entries that a block holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayapp.evaluation.measures.likelihood import HandedOver, TwoStages
from rayapp.kv.cache import held_entries
from rayapp.models.attention import attention_weights, observed_attention

WINDOW = 32
"""Number of last prompt tokens that vote by their attention: SnapKV's observation window."""


@dataclass(frozen=True)
class PromptAttention:
    """Attention of one batch on the entries that every block caches in prefill.

    Attributes:
        num_prompt_tokens: The length of every prompt of the batch.
        num_prompts: Number of prompts, B.
        num_kv_heads: Number of KV heads, H.
        held: Number of entries, N, by block where decode attends.
        last: Attention ``(B, N)`` of the last prompt token by block, averaged over heads. Blocks
            where prefill does not attend are missing.
        votes: Attention ``(B, H, N)`` of the last ``WINDOW`` prompt tokens by block, summed over
            them and averaged over the query heads of a KV head. Missing as in ``last``.
    """

    num_prompt_tokens: int
    num_prompts: int
    num_kv_heads: int
    held: dict[int, int]
    last: dict[int, torch.Tensor]
    votes: dict[int, torch.Tensor]


def watched_hand_over(
    stages: TwoStages, prompts_BT: torch.Tensor
) -> tuple[HandedOver, PromptAttention]:
    """Prefill prompts and hand their KV over, recording prefill's attention on the way."""
    seen: list[torch.Tensor] = []

    def look(query_BQTD: torch.Tensor, keys_BHTD: torch.Tensor, scaling: float) -> None:
        seen.append(_window_weights(query_BQTD, keys_BHTD, scaling, windows[len(seen)]))

    attending = [b for b, attends in enumerate(stages.prefill.attends) if attends]
    windows = [stages.prefill.windows[block] for block in attending]
    with observed_attention(look):
        handed = stages.hand_over(prompts_BT)
    num_run, heads = len(handed.positions_T), stages.prefill.num_kv_heads
    held = {
        block: held_entries(num_run, stages.decode.windows[block])
        for block, attends in enumerate(stages.decode.attends)
        if attends
    }
    weights = {b: w for b, w in zip(attending, seen, strict=False) if held.get(b)}
    return handed, PromptAttention(
        num_prompt_tokens=prompts_BT.shape[1],
        num_prompts=prompts_BT.shape[0],
        num_kv_heads=heads,
        held=held,
        last={b: w[:, :, -1, -held[b] :].mean(dim=1) for b, w in weights.items()},
        votes={
            b: w[..., -held[b] :].sum(dim=2).unflatten(1, (heads, -1)).mean(dim=2)
            for b, w in weights.items()
        },
    )


def _window_weights(
    query_BQTD: torch.Tensor, keys_BHTD: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Attention ``(B, Q, W, T)`` of the window's tokens on all tokens of the prompt."""
    num_tokens = keys_BHTD.shape[2]
    first = max(0, num_tokens - WINDOW)
    distance_WT = torch.arange(first, num_tokens)[:, None] - torch.arange(num_tokens)
    mask_WT = (distance_WT >= 0) & (distance_WT < (window or num_tokens))
    mask = mask_WT.to(keys_BHTD.device)
    return attention_weights(query_BQTD[:, :, first:], keys_BHTD, mask, scaling).cpu()
