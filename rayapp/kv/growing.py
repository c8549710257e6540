"""The KV of prompts that are prefilled in chunks, and the passes in which prompts share products.

A pass runs the next tokens of several prompts in one row, one after the other: products see all of
them at once, and attention sees every prompt alone, with the entries of its earlier chunks.
Nothing is padded.
Shapes: Q = query heads, H = KV heads, T = tokens of a pass, C = tokens of one prompt in it,
K = entries attended to, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rayapp.kv.cache import CaptureCache, StackShape
from rayapp.models.real_tokens import RealTokens


class PromptKV:
    """The KV of one prompt while it is prefilled, of every block that writes KV.

    Entries that are known never change, so other threads may read them while a pass goes on.

    Args:
        stack: The shape of the model.
        positions_T: Positions of all tokens to run, ascending, int64.
    """

    def __init__(self, stack: StackShape, positions_T: torch.Tensor) -> None:
        self._stack = stack
        self.positions_T = positions_T
        self.num_done = 0
        self._entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._num_known: dict[int, int] = {}

    @property
    def num_tokens(self) -> int:
        """Number of tokens to run."""
        return int(self.positions_T.shape[0])

    def append(
        self, block: int, keys_1HCD: torch.Tensor, values_1HCD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a chunk's entries of one block; return all its entries up to the chunk's end."""
        count = keys_1HCD.shape[2]
        if count == self.num_tokens:  # The whole prompt in one chunk needs no copy.
            self._entries[block] = (keys_1HCD, values_1HCD)
            self._num_known[block] = count
            return keys_1HCD, values_1HCD
        if block not in self._entries:
            shape = (*keys_1HCD.shape[:2], self.num_tokens, keys_1HCD.shape[3])
            self._entries[block] = (keys_1HCD.new_empty(shape), values_1HCD.new_empty(shape))
        stop = self.num_done + count
        keys, values = self._entries[block]
        keys[:, :, self.num_done : stop] = keys_1HCD
        values[:, :, self.num_done : stop] = values_1HCD
        self._num_known[block] = stop  # It comes last: whoever reads it finds the entries.
        return keys[:, :, :stop], values[:, :, :stop]

    def num_known(self, block: int) -> int:
        """Number of tokens whose entries of a block are known, at any moment of a pass."""
        return self._num_known.get(block, 0)

    def memory(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(1, H, T, D)`` of a block; T is 0 while none of them is known."""
        if block in self._entries:
            return self._entries[block]
        shape = (1, self._stack.num_kv_heads, 0, self._stack.head_dim)
        none_1H0D = torch.empty(shape, dtype=self._stack.dtype)
        return none_1H0D, none_1H0D

    def captured(self) -> CaptureCache:
        """Return the cache that one pass over the whole prompt would have filled."""
        cache = CaptureCache.for_stack(self._stack)
        for block in sorted(self._entries):
            cache.update(*self._entries[block], block)
        return cache


class Pass:
    """The next ``counts`` tokens of ``prompts`` in one row, and the cache that a run of it fills.

    ``BlockStack.run`` takes it as the cache, with its :attr:`masks` and :attr:`real_tokens`.

    Args:
        prompts: The KV of every prompt.
        counts: Number of tokens of every prompt to run.
        stack: The shape of the model.
        noted: Called whenever the entries of one more block are known, within the pass.
        device: Device on which the pass runs.
    """

    def __init__(
        self,
        prompts: Sequence[PromptKV],
        counts: Sequence[int],
        stack: StackShape,
        noted: Callable[[], None] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._noted = noted
        self._prompts = tuple(prompts)
        self._counts = tuple(counts)
        parts = list(zip(self._prompts, self._counts, strict=True))
        by_window = {
            window: [_on(device, _mask(kv, count, window)) for kv, count in parts]
            for window in set(stack.windows)
        }
        self.masks = {block: by_window[window] for block, window in enumerate(stack.windows)}
        self.real_tokens = RealTokens.full(*((1, count) for count in counts))
        self.positions_1T = torch.cat(
            [kv.positions_T[kv.num_done : kv.num_done + count] for kv, count in parts]
        )[None]

    def update(
        self, keys_1HTD: torch.Tensor, values_1HTD: torch.Tensor, block: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Add the entries of ``block`` to every prompt; return what each prompt attends to."""
        pieces = zip(
            self._prompts,
            keys_1HTD.split(self._counts, dim=2),
            values_1HTD.split(self._counts, dim=2),
            strict=True,
        )
        attended = [kv.append(block, keys, values) for kv, keys, values in pieces]
        if self._noted is not None:
            self._noted()
        return [keys for keys, _ in attended], [values for _, values in attended]

    def finish(self) -> None:
        """Count the tokens as run once all blocks have run."""
        for kv, count in zip(self._prompts, self._counts, strict=True):
            kv.num_done += count


def _on(device: torch.device | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.to(device)


def _mask(kv: PromptKV, count: int, window: int | None) -> torch.Tensor | None:
    """The mask ``(1, 1, C, K)`` of a chunk over its prompt so far; None if it is plainly causal.

    Windows are counted in positions, not in tokens, because pruned prompts have gaps.
    """
    stop = kv.num_done + count
    keys_K, queries_C = kv.positions_T[:stop], kv.positions_T[kv.num_done : stop]
    span = int(queries_C[-1] - keys_K[0]) + 1
    is_windowed = window is not None and window < span
    if not is_windowed and (kv.num_done == 0 or count == 1):
        return None
    distance_CK = queries_C[:, None] - keys_K[None, :]
    allowed_CK = distance_CK >= 0
    if window is not None:
        allowed_CK &= distance_CK < window
    return allowed_CK[None, None]
