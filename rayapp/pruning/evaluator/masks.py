"""Attention masks of each stage's tokens, made once per chunk and sliding window."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rayapp.plan import SEND_ALL
from rayapp.pruning.candidates.candidate import SEND_ALL_RULE, KVRule, transfer_of
from rayapp.pruning.evaluator.handoff import Handoff


class Masks:
    """Masks of all chunks, shared by blocks that have the same sliding window.

    Args:
        inputs: Gives the inputs of both stages on a chunk.
        windows: Sliding window of every block, or None.
        device: Device that the masks are made for.
        dtype: Element type of attention.
    """

    def __init__(
        self,
        inputs: Callable[[int], Handoff],
        windows: Sequence[int | None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._inputs = inputs
        self._windows = windows
        self._device = device
        self._dtype = dtype
        self._prefill: dict[tuple[object, ...], torch.Tensor | None] = {}
        self._decode: dict[tuple[object, ...], torch.Tensor] = {}
        self._biases: dict[tuple[object, ...], torch.Tensor] = {}

    def prefill(self, chunk: int, block: int) -> torch.Tensor | None:
        """Mask of prompt tokens in a block; None is the causal mask."""
        key = (chunk, self._windows[block])
        if key not in self._prefill:
            mask = self._inputs(chunk).prefill_mask(self._windows[block])
            self._prefill[key] = None if mask is None else mask.to(self._device)
        return self._prefill[key]

    def decode(self, chunk: int, block: int, rule: KVRule | None = None) -> torch.Tensor:
        """Mask of decode's tokens in a block under a transfer rule; the rule None sends all."""
        window = self._windows[block]
        key = (chunk, rule[1:3] if rule else SEND_ALL_RULE[:2], window)
        if key not in self._decode:
            mask = self._inputs(chunk).decode_mask(transfer_of(rule) if rule else SEND_ALL, window)
            self._decode[key] = mask.to(self._device)
        return self._decode[key]

    def decode_bias(self, chunk: int, block: int, rule: KVRule) -> torch.Tensor:
        """Decode's mask as attention's kernels want it: 0 or -inf, added to the products."""
        key = (chunk, rule[1:3], self._windows[block])
        if key not in self._biases:
            mask = self.decode(chunk, block, rule)
            bias = torch.zeros_like(mask, dtype=self._dtype)
            self._biases[key] = bias.masked_fill_(~mask, -torch.inf)
        return self._biases[key]
