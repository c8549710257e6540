"""The entries of one sequence in one group of blocks: in pages, or copied to host memory.

Shapes: H = KV heads, N = blocks of the group, L = entries, D = head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rayapp.engine.pages import Sheet


@dataclass(eq=False)
class Entries:
    """The entries of one sequence in one group: at most ``limit`` of its own, in pages.

    Entries before ``low`` have left the window. ``positions`` are kept where there is a window.
    ``prompt`` is a sheet of earlier entries that other answers hold too.
    """

    sheet: Sheet
    limit: int
    low: int = 0
    positions: list[int] = field(default_factory=list)
    prompt: Sheet | None = None

    @property
    def sheets(self) -> tuple[Sheet, ...]:
        """The sequence's own sheet, then its prompt's."""
        return (self.sheet,) if self.prompt is None else (self.sheet, self.prompt)

    @property
    def num_seen(self) -> int:
        """Number of entries that the latest query sees."""
        before = 0 if self.prompt is None else self.prompt.used
        return before + self.sheet.used - self.low


@dataclass(frozen=True)
class StoredEntries:
    """One sequence's entries of one group, copied to host memory, ``(H, N, L, D)``."""

    keys_HNLD: torch.Tensor
    values_HNLD: torch.Tensor
    positions: list[int]
    limit: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of keys and values."""
        return self.keys_HNLD.nbytes + self.values_HNLD.nbytes
