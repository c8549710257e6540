"""KV segments: keys and values of one prompt that decode will attend to, positions per block.

Shapes: H = KV heads, N = entries of one block, D = head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayapp.plan import Encoding


@dataclass(frozen=True)
class BlockKV:
    """The kept entries of one block; ``positions_N`` ascend."""

    block: int
    keys_HND: torch.Tensor
    values_HND: torch.Tensor
    positions_N: torch.Tensor
    encoding: Encoding = "model"

    @property
    def num_entries(self) -> int:
        """Entries kept."""
        return int(self.positions_N.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in the model's own type."""
        return self.keys_HND.nbytes + self.values_HND.nbytes


@dataclass(frozen=True)
class KVSegment:
    """What travels for one prompt, blocks ascending.

    ``num_prompt_tokens`` is the unpruned length T, ``num_visual_tokens_removed`` of them were not
    run. ``num_prefilled`` counts the tokens that prefill ran: all others, or one less where decode
    runs the last prompt token (``first_token: decode``). ``is_compact``: positions were numbered
    anew, without the gaps of removed tokens.
    """

    blocks: tuple[BlockKV, ...]
    num_prompt_tokens: int
    num_prefilled: int
    num_visual_tokens_removed: int = 0
    is_compact: bool = False

    @property
    def next_position(self) -> int:
        """Position of the first answer token."""
        removed = self.num_visual_tokens_removed if self.is_compact else 0
        return self.num_prompt_tokens - removed

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values in the model's own type."""
        return sum(entry.nbytes for entry in self.blocks)
