"""A KV segment: the keys and values of one prompt that decode attends to, with their positions.

Shapes: H = KV heads, N = entries of one block, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from rayapp.plan import Encoding


@dataclass(frozen=True)
class BlockKV:
    """The kept entries of one block; their ``positions_N`` ascend."""

    block: int
    keys_HND: torch.Tensor
    values_HND: torch.Tensor
    positions_N: torch.Tensor
    encoding: Encoding = "model"

    @property
    def num_entries(self) -> int:
        """Number of entries that were kept."""
        return int(self.positions_N.shape[0])

    @property
    def nbytes(self) -> int:
        """Number of bytes of keys and values in the model's own type."""
        return self.keys_HND.nbytes + self.values_HND.nbytes


@dataclass(frozen=True)
class KVExtent:
    """The lengths of a prompt whose KV travels, known before any of it is computed.

    ``num_prompt_tokens`` is the unpruned length, of which ``num_visual_tokens_removed`` were not
    run. ``num_prefilled`` counts the tokens that prefill ran: all others, or one less if decode
    runs the last prompt token (``first_token: decode``). ``is_compact`` is true if positions were
    numbered anew, without the gaps of removed tokens.
    """

    num_prompt_tokens: int
    num_prefilled: int
    num_visual_tokens_removed: int = 0
    is_compact: bool = False

    @property
    def next_position(self) -> int:
        """Position of the first answer token."""
        removed = self.num_visual_tokens_removed if self.is_compact else 0
        return self.num_prompt_tokens - removed

    def segment(self, blocks: Iterable[BlockKV]) -> KVSegment:
        """A segment of these lengths."""
        return KVSegment(tuple(blocks), **asdict(self))


@dataclass(frozen=True)
class KVSegment:
    """The KV that travels for one prompt, or a part of it, blocks ascending.

    The numbers are those of :class:`KVExtent`.
    """

    blocks: tuple[BlockKV, ...]
    num_prompt_tokens: int
    num_prefilled: int
    num_visual_tokens_removed: int = 0
    is_compact: bool = False

    @property
    def extent(self) -> KVExtent:
        """The lengths of the prompt."""
        return KVExtent(
            self.num_prompt_tokens,
            self.num_prefilled,
            self.num_visual_tokens_removed,
            self.is_compact,
        )

    @property
    def nbytes(self) -> int:
        """Number of bytes of all keys and values in the model's own type."""
        return sum(entry.nbytes for entry in self.blocks)
