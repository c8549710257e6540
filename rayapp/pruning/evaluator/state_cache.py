"""A cache of tensors for reuse, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

Tensors = tuple[torch.Tensor, ...]


class StateCache:
    """A cache that drops its least recently used states first, and the dense model's last of all.

    A bound of 0 keeps nothing. A running pass has its own references, so a bound that is too small
    costs time, never a result.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._dense: OrderedDict[Hashable, Tensors] = OrderedDict()
        self._others: OrderedDict[Hashable, Tensors] = OrderedDict()

    def get(self, key: Hashable) -> Tensors | None:
        """The tensors that were put under ``key``, if they are still here."""
        for shelf in (self._others, self._dense):
            if key in shelf:
                shelf.move_to_end(key)
                return shelf[key]
        return None

    def put(self, key: Hashable, tensors: Tensors, *, dense: bool = False) -> None:
        """Keep ``tensors``, dropping older ones as the bound demands."""
        size = _nbytes(tensors)
        if size > self.max_bytes or self.get(key) is not None:
            return
        while self.nbytes + size > self.max_bytes:
            shelf = self._others or self._dense
            if not dense and shelf is self._dense:
                return
            self.nbytes -= _nbytes(shelf.popitem(last=False)[1])
        (self._dense if dense else self._others)[key] = tensors
        self.nbytes += size


def _nbytes(tensors: Tensors) -> int:
    """Bytes that the tensors keep alive: whole storages, also those of views."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
