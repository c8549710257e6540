"""Attention scores that methods rank by: the tower's CLS token, and the prompt's last token.

Fast attention kernels never form the weights, so the single row that a score needs is computed here
from the queries and keys of one block.
Shapes: P = views of an image, N = tokens, T = prompt tokens, E = hidden size, H = KV heads,
G = query heads per KV head, D = head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rayapp.errors import ModelError, PlanError
from rayapp.models.stack import BlockStack

# FastV's K (arXiv:2403.06764): the paper calls block 2 a good trade-off.
FASTV_BLOCK = 2


@contextmanager
def captured_cls_attention(tower: Any, feature_layer: int | list[int]) -> Iterator[list[Any]]:
    """Let every run of the tower append its CLS attention ``(P, N)`` to the yielded list.

    The attention is that of the block whose output the projector takes, averaged over heads
    (FasterVLM, arXiv:2412.01818); if there are several feature layers, the last one counts.

    Raises:
        ModelError: The tower has no CLS token.
    """
    if tower.config.model_type != "clip_vision_model":
        raise ModelError(
            f"method cls_attention needs a vision tower with a CLS token, but this model's is "
            f"{tower.config.model_type!r}; choose another method"
        )
    number = feature_layer if isinstance(feature_layer, int) else feature_layer[-1]
    blocks = tower.encoder.layers
    # Hidden state i is the output of block i - 1; negative numbers count from the last output.
    attention = blocks[number - 1 if number >= 0 else len(blocks) + number].self_attn
    rows: list[torch.Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(_cls_row(attention, kwargs["hidden_states"] if not args else args[0]))

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def _cls_row(attention: Any, hidden_PTE: torch.Tensor) -> torch.Tensor:
    """Attention of token 0 to all others ``(P, N)``, float32, averaged over heads."""
    views, length, _ = hidden_PTE.shape
    query = attention.q_proj(hidden_PTE[:, :1]).view(views, 1, -1, attention.head_dim)
    keys = attention.k_proj(hidden_PTE).view(views, length, -1, attention.head_dim)
    scores = (query.transpose(1, 2) @ keys.permute(0, 2, 3, 1)) * attention.scale
    return scores.float().softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


@torch.inference_mode()
def last_token_attention(
    stack: BlockStack, hidden_TE: torch.Tensor, *, block: int = FASTV_BLOCK
) -> torch.Tensor:
    """Attention of the last prompt token to every token in the ``block``-th block that attends.

    FastV's score (arXiv:2403.06764), averaged over heads, float32, ``(T,)``. Under a plan that
    removes attention from the first blocks, the blocks that remain are counted.

    Raises:
        PlanError: The stage has fewer attending blocks.
    """
    attending = [number for number, attends in enumerate(stack.attends) if attends]
    if len(attending) < block:
        raise PlanError(
            f"method fastv reads attention block {block}, but prefill attends in {len(attending)} "
            "blocks only; choose another method"
        )
    number = attending[block - 1]
    positions_1T = torch.arange(hidden_TE.shape[0], device=hidden_TE.device)[None]
    hidden_1TE = stack.run(hidden_TE[None], positions_1T, _PassThrough(), stop=number)
    device = stack.devices[number]
    rotary = stack.rotary(hidden_1TE, positions_1T)
    return _last_row(
        stack.blocks[number],
        hidden_1TE.to(device),
        (rotary[0].to(device), rotary[1].to(device)),
        stack.windows[number],
    )


class _PassThrough:
    """A cache that keeps nothing and returns new entries only."""

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new entries unchanged."""
        del block
        return keys_BHTD, values_BHTD


def _last_row(
    block: Any,
    hidden_1TE: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    window: int | None,
) -> torch.Tensor:
    attention = block.self_attn
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    normed_1TE = block.input_layernorm(hidden_1TE)
    shape = (*normed_1TE.shape[:-1], -1, attention.head_dim)
    queries, keys = attention.q_proj(normed_1TE).view(shape), attention.k_proj(normed_1TE)
    keys = keys.view(shape)
    if getattr(attention, "q_norm", None) is not None:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries_1QTD, keys_1HTD = rotate(queries.transpose(1, 2), keys.transpose(1, 2), *rotary)
    query_HGD = queries_1QTD[0, :, -1].unflatten(0, (keys_1HTD.shape[1], -1))
    scores_HGT = (query_HGD @ keys_1HTD[0].transpose(1, 2)).float() * attention.scaling
    if window is not None:
        scores_HGT[..., : -window or None] = -torch.inf
    return scores_HGT.softmax(dim=-1).flatten(0, 1).mean(dim=0)
