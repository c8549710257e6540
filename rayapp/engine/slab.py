"""The slab: preallocated KV of all running sequences, for every block where decode attends.

A *group* is a set of blocks that always have the same positions, because the plan cuts them alike
and they share one sliding window; every group counts its own entries per slot. Active slots are the
first ``B``, without a hole, so a step reads one slice. Positions ascend within a slot, so an entry
that fell out of a sliding window never returns: a query sees one range ``low..used`` per slot, and
if all slots have equal ranges no mask is needed.

Freed entries are zeroed. A masked entry counts with weight 0, but 0 x inf is NaN, so the numbers of
one request must never stay for another.
Shapes: N = blocks of a group, S = slots, H = KV heads, L = entries per slot, D = head dimension,
B = active slots, K = entries attended to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayapp.errors import WireError
from rayapp.kv.segment import BlockKV, KVSegment
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan


class BlockGroup:
    """Keys, values and positions of blocks that always have entries at the same positions.

    Args:
        blocks: Numbers of the blocks, ascending.
        window: The sliding window of the blocks, None for full attention.
        shape_SHLD: Numbers of slots, KV heads, entries per slot, and the head dimension.
        dtype: Element type of keys and values.
        device: Device of keys and values.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        window: int | None,
        shape_SHLD: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_slots, num_heads, capacity, _ = shape_SHLD
        self.blocks = blocks
        self.window = window
        self.capacity = capacity
        self.keys_NSHLD = torch.zeros((len(blocks), *shape_SHLD), dtype=dtype, device=device)
        self.values_NSHLD = torch.zeros_like(self.keys_NSHLD)
        self.positions_SL = np.zeros((num_slots, capacity), dtype=np.int64)
        self.used_S = np.zeros(num_slots, dtype=np.int64)
        self.low_S = np.zeros(num_slots, dtype=np.int64)
        self._slots = np.arange(num_slots)
        # A block's memory seen as rows of D: a step writes one row per active slot and head.
        self._key_rows = self.keys_NSHLD.flatten(1, 3).unbind()
        self._value_rows = self.values_NSHLD.flatten(1, 3).unbind()
        heads_SH = np.arange(num_slots * num_heads).reshape(num_slots, num_heads)
        self._first_rows_SH = heads_SH * capacity
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._keys: tuple[torch.Tensor, ...] = ()
        self._values: tuple[torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Number of bytes of keys and values."""
        return self.keys_NSHLD.nbytes + self.values_NSHLD.nbytes

    def load(self, slot: int, entries: Sequence[BlockKV]) -> None:
        """Copy the group's part of a segment into a free slot."""
        num_entries = entries[0].num_entries
        for index, entry in enumerate(entries):
            self.keys_NSHLD[index, slot, :, :num_entries] = entry.keys_HND
            self.values_NSHLD[index, slot, :, :num_entries] = entry.values_HND
        self.positions_SL[slot, :num_entries] = entries[0].positions_N.numpy()
        self.used_S[slot] = num_entries
        self.low_S[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        used = int(self.used_S[source])
        for tensor in (self.keys_NSHLD, self.values_NSHLD):
            tensor[:, target, :, :used] = tensor[:, source, :, :used]
        self.positions_SL[target, :used] = self.positions_SL[source, :used]
        self.used_S[target], self.low_S[target] = used, self.low_S[source]

    def clear(self, slot: int) -> None:
        """Empty one slot and zero its entries."""
        used = int(self.used_S[slot])
        for tensor in (self.keys_NSHLD, self.values_NSHLD):
            tensor[:, slot, :, :used] = 0
        self.positions_SL[slot, :used] = 0
        self.used_S[slot] = self.low_S[slot] = 0

    def begin_step(self, positions_B: np.ndarray) -> torch.Tensor | None:
        """Claim an entry in every active slot; return a mask ``(B, 1, 1, K)`` if one is needed."""
        num_active = len(positions_B)
        slots, used_B = self._slots[:num_active], self.used_S[:num_active]
        self.positions_SL[slots, used_B] = positions_B
        rows_BH = self._first_rows_SH[:num_active] + used_B[:, None]
        self._rows = torch.from_numpy(rows_BH.reshape(-1)).to(self.keys_NSHLD.device)
        used_B += 1
        low_B = self._leave_window(positions_B)
        low, high = int(low_B.min()), int(used_B.max())
        self._keys = self.keys_NSHLD[:, :num_active, :, low:high].unbind()
        self._values = self.values_NSHLD[:, :num_active, :, low:high].unbind()
        if (used_B == high).all() and (low_B == low).all():
            return None
        entries_K = np.arange(low, high)
        mask_BK = (entries_K < used_B[:, None]) & (entries_K >= low_B[:, None])
        return torch.from_numpy(mask_BK).to(self.keys_NSHLD.device)[:, None, None]

    def _leave_window(self, positions_B: np.ndarray) -> np.ndarray:
        """Index of the first entry that the query of an active slot still sees, for every slot."""
        num_active = len(positions_B)
        low_B = self.low_S[:num_active]
        if self.window is not None:
            oldest_B, slots = positions_B - self.window, self._slots[:num_active]
            while (left_B := self.positions_SL[slots, low_B] <= oldest_B).any():
                low_B += left_B
        return low_B

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's entries (T = 1) of block ``index``; return the KV to attend to."""
        self._key_rows[index].index_copy_(0, self._rows, keys_BHTD.flatten(0, 2))
        self._value_rows[index].index_copy_(0, self._rows, values_BHTD.flatten(0, 2))
        return self._keys[index], self._values[index]


class Slab:
    """All groups of one decode stage; a ``BlockCache`` for steps of one token per active slot.

    Args:
        stack: The blocks of the decode stage.
        plan: The plan, which says which blocks attend and how their KV was cut.
        num_slots: Number of sequences that run at once.
        capacity: Number of entries per slot and block.
    """

    def __init__(
        self, stack: BlockStack, plan: PruningPlan, *, num_slots: int, capacity: int
    ) -> None:
        shape_SHLD = (num_slots, stack.num_kv_heads, capacity, stack.head_dim)
        self.capacity = capacity
        self.groups = tuple(
            BlockGroup(
                blocks,
                stack.windows[blocks[0]],
                shape_SHLD,
                stack.dtype,
                stack.devices[blocks[0]],
            )
            for blocks in _alike(stack, plan)
        )
        self.blocks = tuple(sorted(block for group in self.groups for block in group.blocks))
        self._places = {
            block: (group, index)
            for group in self.groups
            for index, block in enumerate(group.blocks)
        }
        self._shape_HD = (stack.num_kv_heads, stack.head_dim)
        self._dtype = stack.dtype

    @property
    def nbytes(self) -> int:
        """Number of bytes of keys and values, in use or not."""
        return sum(group.nbytes for group in self.groups)

    @property
    def num_used(self) -> int:
        """Number of entries in use, summed over blocks and slots."""
        return sum(len(group.blocks) * int(group.used_S.sum()) for group in self.groups)

    @property
    def num_entries(self) -> int:
        """Number of all entries, in use or not, summed over blocks and slots."""
        return sum(len(group.blocks) * group.positions_SL.size for group in self.groups)

    def check(self, segment: KVSegment) -> None:
        """Raise :class:`WireError` if a segment is not exactly the KV that this stage needs."""
        blocks = tuple(entry.block for entry in segment.blocks)
        if blocks != self.blocks:
            raise WireError(
                f"the KV segment holds blocks {list(blocks)}, decode attends in blocks "
                f"{list(self.blocks)}; "
                "prefill and decode must run the same plan"
            )
        by_block = {entry.block: entry for entry in segment.blocks}
        heads, dim = self._shape_HD
        for group in self.groups:
            positions_N = by_block[group.blocks[0]].positions_N
            shape = (heads, positions_N.shape[0], dim)
            for block in group.blocks:
                entry = by_block[block]
                layouts = {(t.dtype, tuple(t.shape)) for t in (entry.keys_HND, entry.values_HND)}
                if layouts != {(self._dtype, shape)} or not torch.equal(
                    entry.positions_N, positions_N
                ):
                    raise WireError(
                        f"block {block} has keys and values {layouts}, expected {self._dtype} "
                        f"{shape} at the positions of block {group.blocks[0]}; prefill again"
                    )

    def load(self, slot: int, segment: KVSegment) -> None:
        """Copy a checked segment into a free slot."""
        by_block = {entry.block: entry for entry in segment.blocks}
        for group in self.groups:
            group.load(slot, [by_block[block] for block in group.blocks])

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another, in every block."""
        for group in self.groups:
            group.move(source, target)

    def clear(self, slot: int) -> None:
        """Empty one slot, in every block."""
        for group in self.groups:
            group.clear(slot)

    def begin_step(self, positions_B: np.ndarray) -> dict[int, torch.Tensor | None]:
        """Claim an entry in every active slot and block; return the step's masks by block."""
        masks: dict[int, torch.Tensor | None] = {}
        for group in self.groups:
            mask = group.begin_step(positions_B)
            if mask is not None:
                masks.update(dict.fromkeys(group.blocks, mask))
        return masks

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's entries of ``block``; return the KV ``(B, H, K, D)`` to attend to."""
        group, index = self._places[block]
        return group.update(keys_BHTD, values_BHTD, index)


def _alike(stack: BlockStack, plan: PruningPlan) -> list[tuple[int, ...]]:
    """Group the blocks where decode attends by device, rule and window, so by equal entries."""
    groups: dict[object, list[int]] = {}
    for block in range(stack.num_blocks):
        if stack.attends[block]:
            rule = plan.transfer(block)
            alike = (rule.first, rule.last, stack.windows[block], stack.devices[block])
            groups.setdefault(alike, []).append(block)
    return [tuple(blocks) for blocks in groups.values()]
