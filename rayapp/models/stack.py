"""The decoder of one stage, run block by block on explicit positions, caches and masks.

The model's own ``forward`` builds one mask for all blocks and guesses positions from block 0's
cache: both are wrong once a plan cuts blocks differently. Here every block gets its own.
Shapes: B = batch, T = query tokens, K = entries attended to, E = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from rayapp.errors import ModelError
from rayapp.models.architecture import head_dim, sliding_windows, text_config
from rayapp.models.attention import PACKED_SDPA
from rayapp.models.blocks import apply_stage, find_decoder
from rayapp.models.products.packed import weight_of
from rayapp.models.real_tokens import RealTokens
from rayapp.plan import PruningPlan, Stage


class BlockCache(Protocol):
    """A cache to which a block writes its KV, and from which it gets the KV to attend to."""

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int
    ) -> tuple[Any, Any]:
        """Add new entries of ``block``; return all keys and values to attend to, ``BHKD``.

        Of joined batches, it returns a tensor per batch.
        """
        ...


Masks = Mapping[int, Any]
"""Masks by block; those of joined batches are sequences with a mask, or None, per batch."""


class BlockStack:
    """One stage of a plan over a model, without copying weights.

    Args:
        model: A dense model, or one that was loaded for this stage.
        plan: The plan; an empty one runs the dense model.
        stage: The stage of the plan to run.

    Raises:
        ModelError: The architecture is not supported, or tensors of this stage were not loaded.
        PlanError: The plan was made for another model.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan, stage: Stage) -> None:
        self.model = apply_stage(model, plan, stage)
        self.stage: Stage = stage
        self._decoder: Any = find_decoder(self.model)
        text = text_config(self.model.config)
        # Only sdpa treats a missing mask as causal attention where that is needed.
        for config in (self.model.config, text, self._decoder.config):
            config._attn_implementation = PACKED_SDPA
        for attention in (m for m in self._decoder.modules() if hasattr(m, "num_key_value_groups")):
            attention.config._attn_implementation = PACKED_SDPA
        self.num_blocks: int = text.num_hidden_layers
        self.num_query_heads: int = text.num_attention_heads
        self.num_kv_heads: int = text.num_key_value_heads
        self.head_dim = head_dim(self.model.config)
        self.vocab_size: int = text.vocab_size
        self.windows = sliding_windows(self.model.config)
        modes = [plan.mode(stage, block) for block in range(self.num_blocks)]
        self.attends = tuple(mode.attends for mode in modes)
        self.writes_kv = tuple(mode.writes_kv for mode in modes)
        self._check_loaded()
        parameters = [next(block.parameters(), None) for block in self._decoder.layers]
        self.devices = tuple(self.device if p is None else p.device for p in parameters)
        self._is_spread = any(device != self.device for device in self.devices)

    def _check_loaded(self) -> None:
        missing = [name for name, p in self._decoder.named_parameters() if p.is_meta]
        if missing:
            raise ModelError(
                f"{len(missing)} tensors that the {self.stage} stage needs were not loaded "
                f"(first: {missing[0]}); load the model for this stage and plan, or without a stage"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Element type of activations and KV."""
        return self._decoder.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, where token ids enter."""
        return self._decoder.embed_tokens.weight.device

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules of this stage's blocks."""
        return self._decoder.layers

    def rotary(
        self, hidden_BTE: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``(B or 1, T, D)`` of positions, in the type of ``hidden_BTE``."""
        return self._decoder.rotary_emb(hidden_BTE, position_ids=positions_BT.to(hidden_BTE.device))

    def embed(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Embed token ids as the hidden states ``(B, T, E)`` that enter block 0."""
        return self._decoder.embed_tokens(token_ids_BT.to(self.device))

    def run(
        self,
        hidden_BTE: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: BlockCache,
        masks: Masks | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        real_tokens: RealTokens | None = None,
    ) -> torch.Tensor:
        """Run blocks ``start`` to ``stop`` (exclusive; default: all); return hidden states.

        Args:
            hidden_BTE: Hidden states that enter block ``start``.
            positions_BT: Position of every token in the unpruned sequence, int64, ``(B or 1, T)``.
            cache: The cache that receives KV, and returns the KV to attend to.
            masks: Boolean masks by block, which broadcast to ``(B, 1, T, K)``, True = may attend.
                A block without one is causal if T == K (its sliding window honoured), and sees all
                entries if T == 1.
            start: The first block to run.
            stop: The block before which to stop.
            rotary: The result of :meth:`rotary` for these positions, if it is at hand.
            real_tokens: The batches whose real tokens ``hidden_BTE`` joins in one row. The cache
                then returns keys and values of every batch, and masks are given per batch.
        """
        joined = {} if real_tokens is None else {"real_tokens": real_tokens}
        positions_BT = positions_BT.to(hidden_BTE.device)
        rotary = self.rotary(hidden_BTE, positions_BT) if rotary is None else rotary
        masks = self.window_masks(positions_BT) if masks is None else masks
        for number in range(start, self.num_blocks if stop is None else stop):
            mask = masks.get(number)
            if self._is_spread:
                device = self.devices[number]
                hidden_BTE, positions_BT = hidden_BTE.to(device), positions_BT.to(device)
                rotary = (rotary[0].to(device), rotary[1].to(device))
                mask = _moved(mask, device)
            hidden_BTE = self._decoder.layers[number](
                hidden_BTE,
                attention_mask=mask,
                position_ids=positions_BT,
                past_key_values=cache,
                position_embeddings=rotary,
                **joined,
            )
        return hidden_BTE

    def window_masks(self, positions_BT: torch.Tensor) -> Masks:
        """Masks of the sliding-window blocks over a fresh prompt that spans more than the window.

        The span is counted in positions, not in tokens, because pruned prompts have gaps.
        """
        windows = {w for w in self.windows if w is not None}
        if not windows or not positions_BT.numel():
            return {}
        span = int((positions_BT.amax(dim=1) - positions_BT.amin(dim=1)).max()) + 1
        masks: dict[int, torch.Tensor] = {}
        for window in {w for w in windows if w < span}:
            distance_BTK = positions_BT[:, :, None] - positions_BT[:, None, :]
            mask = ((distance_BTK >= 0) & (distance_BTK < window))[:, None]
            masks.update({b: mask for b, w in enumerate(self.windows) if w == window})
        return masks

    def logits(self, hidden_BTE: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, T, V)`` of hidden states that left the last block."""
        norm, head = self._decoder.norm, self.model.get_output_embeddings()
        normed_BTE = norm(hidden_BTE.to(norm.weight.device))
        return head(normed_BTE.to(weight_of(head).device))


def _moved(mask: Any, device: torch.device) -> Any:
    """A mask, or the masks of joined batches, on ``device``."""
    if mask is None or isinstance(mask, torch.Tensor):
        return None if mask is None else mask.to(device)
    return tuple(_moved(each, device) for each in mask)
