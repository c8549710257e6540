"""KV in slots of equal length, one per row: what pages are compared with.

Shapes: B = rows, N = blocks, H = KV heads, L = entries per slot, D = head dimension, K = entries
attended to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from rayapp.models.passes.single_token import AttendingCache
from rayapp.models.stack import BlockStack


class SlotKV(AttendingCache):
    """Slots of ``length`` entries, the first of them filled with noise; every block attends.

    A step attends over the longest row, and masks what the others lack.
    """

    def __init__(self, stack: BlockStack, used: Sequence[int], length: int) -> None:
        heads, dim = stack.num_kv_heads, stack.head_dim
        shape_NBHLD = (stack.num_blocks, len(used), heads, length, dim)
        self._keys_NBHLD = torch.randn(shape_NBHLD, dtype=stack.dtype)
        self._values_NBHLD = torch.randn(shape_NBHLD, dtype=stack.dtype)
        self._used = list(used)
        self._first_rows_BH = torch.arange(len(used) * heads).view(-1, heads) * length
        self._rows = torch.empty(0, dtype=torch.int64)
        self._mask: torch.Tensor | None = None
        self._high = 0

    def begin_step(self) -> None:
        """Claim an entry in every row."""
        used_B = torch.tensor(self._used)
        self._rows = (self._first_rows_BH + used_B[:, None]).flatten()
        self._used = [count + 1 for count in self._used]
        self._high = max(self._used)
        is_even = len(set(self._used)) == 1
        mask_BK = torch.arange(self._high) <= used_B[:, None]
        self._mask = None if is_even else mask_BK[:, None, None]

    def attend(
        self,
        query_BHGD: torch.Tensor,
        keys_BH1D: torch.Tensor,
        values_BH1D: torch.Tensor,
        block: int,
        scale: float,
    ) -> torch.Tensor:
        """Write the new entries and attend over the slots."""
        keys_BHKD, values_BHKD = self.update(keys_BH1D, values_BH1D, block)
        return functional.scaled_dot_product_attention(
            query_BHGD, keys_BHKD, values_BHKD, attn_mask=self._mask, scale=scale
        )

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new entries; return the KV ``(B, H, K, D)`` of all rows up to the longest."""
        for memory_BHLD, new in (
            (self._keys_NBHLD[block], keys_BHTD),
            (self._values_NBHLD[block], values_BHTD),
        ):
            memory_BHLD.flatten(0, 2).index_copy_(0, self._rows, new.flatten(0, 2))
        return (
            self._keys_NBHLD[block, :, :, : self._high],
            self._values_NBHLD[block, :, :, : self._high],
        )
