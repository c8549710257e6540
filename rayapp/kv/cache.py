"""Caches that a stack of blocks writes to: one captures a prefill, one continues from a prefix.

Both have ``update(keys_BHTD, values_BHTD, block)``, which returns the KV that new tokens attend to.
Shapes: B = prompts of equal length, H = KV heads, T = new tokens, N = entries of a block's prefix,
C = continuation tokens, K = N + C, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rayapp.errors import IntegrityError
from rayapp.models.real_tokens import RealTokens


class BatchCache(Protocol):
    """A cache of one batch."""

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new entries of ``block``; return all keys and values to attend to, ``BHKD``."""
        ...


class JoinedCaches:
    """The caches of batches whose tokens run end to end, one cache per batch."""

    def __init__(self, caches: Sequence[BatchCache], tokens: RealTokens) -> None:
        self._caches = tuple(caches)
        self._tokens = tokens

    def update(
        self, keys_1HND: torch.Tensor, values_1HND: torch.Tensor, block: int
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Give every batch its new entries; return the entries that it attends to."""
        new = zip(
            self._tokens.heads_apart(keys_1HND), self._tokens.heads_apart(values_1HND), strict=True
        )
        attended = [
            cache.update(keys_BHTD, values_BHTD, block)
            for cache, (keys_BHTD, values_BHTD) in zip(self._caches, new, strict=True)
        ]
        keys, values = zip(*attended, strict=True)
        return keys, values


class StackShape(Protocol):
    """The properties of a model that its caches depend on; every ``BlockStack`` has them."""

    @property
    def windows(self) -> Sequence[int | None]:
        """Sliding window of every block, None for full attention."""

    @property
    def num_kv_heads(self) -> int:
        """Number of KV heads of a block."""

    @property
    def head_dim(self) -> int:
        """Number of values per head."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of keys and values."""


def held_entries(num_tokens: int, window: int | None) -> int:
    """Number of entries in a block's dense cache after ``num_tokens`` prompt tokens.

    A sliding-window block keeps the entries that the next token can see besides itself, at most
    ``window - 1`` (the rule of transformers' ``DynamicSlidingWindowLayer``).
    """
    return num_tokens if window is None else min(num_tokens, window - 1)


class CaptureCache:
    """The cache that a prefill fills: it keeps the KV of every block from one pass over prompts.

    A block that is run again replaces its entries, so :meth:`fork` and a run from a later block
    give the cache of a candidate that differs from there on.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.windows = tuple(windows)
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self._entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def for_stack(cls, stack: StackShape) -> CaptureCache:
        """An empty cache for the blocks of ``stack``."""
        return cls(
            stack.windows,
            num_kv_heads=stack.num_kv_heads,
            head_dim=stack.head_dim,
            dtype=stack.dtype,
        )

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the entries that the block's dense cache would have; attention sees all T tokens."""
        num_tokens = keys_BHTD.shape[2]
        num_kept = held_entries(num_tokens, self.windows[block])
        if num_kept == num_tokens:
            self._entries[block] = (keys_BHTD, values_BHTD)
        else:  # A view of the window would keep the whole prompt alive.
            start = num_tokens - num_kept
            self._entries[block] = (
                keys_BHTD[:, :, start:].clone(),
                values_BHTD[:, :, start:].clone(),
            )
        return keys_BHTD, values_BHTD

    def entries(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(keys_BHND, values_BHND)`` of ``block``; N = 0 and B = 1 if nothing was run."""
        if block in self._entries:
            return self._entries[block]
        if self._entries:
            raise IntegrityError(
                f"block {block} wrote no KV, only blocks {sorted(self._entries)} did; "
                f"prefill must write KV wherever decode attends"
            )
        empty = torch.empty((1, self.num_kv_heads, 0, self.head_dim), dtype=self.dtype)
        return empty, empty.clone()

    def num_entries(self, block: int) -> int:
        """Number of entries of ``block``."""
        return int(self.entries(block)[0].shape[2])

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that wrote KV, ascending."""
        return tuple(sorted(self._entries))

    @property
    def nbytes(self) -> int:
        """Number of bytes of all keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._entries.values())

    def fork(self, *, before: int | None = None) -> CaptureCache:
        """A cache that shares the tensors of the blocks below ``before`` (of all by default)."""
        forked = CaptureCache(
            self.windows,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )
        forked._entries = {b: kv for b, kv in self._entries.items() if before is None or b < before}
        return forked


@dataclass(frozen=True)
class Prefix:
    """The KV from which one block's decode starts.

    ``positions`` are ``(N,)``, or ``(B, N)`` if they differ between prompts.
    """

    keys_BHND: torch.Tensor
    values_BHND: torch.Tensor
    positions: torch.Tensor

    @property
    def num_entries(self) -> int:
        """Number of entries per prompt."""
        return int(self.keys_BHND.shape[2])


class PrefixCache:
    """A fixed prefix per block, each of its own length, for teacher-forced continuations.

    A continuation is run in one call. New entries are returned, never kept, so one cache serves any
    number of continuations and candidates.
    """

    def __init__(self, prefixes: Mapping[int, Prefix], windows: Sequence[int | None]) -> None:
        self.prefixes = dict(prefixes)
        self.windows = tuple(windows)

    def update(
        self, keys_BHCD: torch.Tensor, values_BHCD: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(keys_BHKD, values_BHKD)``: the block's prefix, then the new entries."""
        prefix = self._prefix(block)
        if not prefix.num_entries:
            return keys_BHCD, values_BHCD
        return (
            torch.cat([prefix.keys_BHND, keys_BHCD], dim=2),
            torch.cat([prefix.values_BHND, values_BHCD], dim=2),
        )

    def repeated(self, counts_B: torch.Tensor) -> PrefixCache:
        """A cache with a row per continuation: ``counts_B`` (int64) tells how many a prompt has."""
        prefixes = {
            block: Prefix(
                prefix.keys_BHND.repeat_interleave(counts_B.to(prefix.keys_BHND.device), dim=0),
                prefix.values_BHND.repeat_interleave(counts_B.to(prefix.values_BHND.device), dim=0),
                prefix.positions,
            )
            for block, prefix in self.prefixes.items()
            if prefix.num_entries
        }
        return PrefixCache(self.prefixes | prefixes, self.windows)

    def masks(self, positions: torch.Tensor) -> dict[int, torch.Tensor]:
        """Masks of every block: the entries that a continuation token may attend to; True = may.

        A token at position q sees an entry at position k where ``k <= q``, and ``q - k < window``
        in a sliding-window block. Blocks with equal positions and window share one tensor.

        Args:
            positions: Positions of the continuation's tokens, ascending, ``(C,)`` or ``(B, C)``.

        Returns:
            Bool tensors ``(B or 1, 1, C, N + C)`` by block, for the ``masks`` of
            ``BlockStack.run``.
        """
        new_BC = torch.atleast_2d(positions)
        shared: list[tuple[torch.Tensor, int | None, torch.Tensor]] = []
        masks: dict[int, torch.Tensor] = {}
        for block, prefix in self.prefixes.items():
            old_BN, window = torch.atleast_2d(prefix.positions), self.windows[block]
            mask = _shared_mask(shared, old_BN, window)
            if mask is None:
                mask = _visible(old_BN.to(new_BC.device), new_BC, window)
                shared.append((old_BN, window, mask))
            masks[block] = mask
        return masks

    def _prefix(self, block: int) -> Prefix:
        if block not in self.prefixes:
            raise IntegrityError(
                f"block {block} attends, but the prefix holds blocks {sorted(self.prefixes)} only; "
                f"select KV with the plan that decode runs"
            )
        return self.prefixes[block]


def _shared_mask(
    shared: list[tuple[torch.Tensor, int | None, torch.Tensor]],
    old_BN: torch.Tensor,
    window: int | None,
) -> torch.Tensor | None:
    for positions, its_window, mask in shared:
        if its_window == window and torch.equal(positions, old_BN):
            return mask
    return None


def _visible(old_BN: torch.Tensor, new_BC: torch.Tensor, window: int | None) -> torch.Tensor:
    """The mask ``(B, 1, C, N + C)`` of tokens at ``new_BC`` over ``old_BN``, then themselves."""
    rows = max(old_BN.shape[0], new_BC.shape[0])
    keys_BK = torch.cat([old_BN.expand(rows, -1), new_BC.expand(rows, -1)], dim=1)
    distance_BCK = new_BC[:, :, None] - keys_BK[:, None, :]
    allowed_BCK = distance_BCK >= 0
    if window is not None:
        allowed_BCK &= distance_BCK < window
    return allowed_BCK[:, None]
