"""A message's bytes, as pieces of memory that need not lie side by side.

A contiguous message would have to be copied together, only to be copied again into an object store.
Pieces are views of the memory that the KV was computed into; a store copies them once, and the
receiver copies them once more, to where they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rayapp.errors import WireError

Bytes = npt.NDArray[np.uint8]

COPIED_AT_ONCE = 256 << 10
"""Bytes that are copied, then noted while a processor's cache has them (project default)."""


class Arrival(Protocol):
    """A message at its receiver, whose body may still lie elsewhere.

    A faster link hands out the head, which is small, and reads the body from memory that the sender
    registered straight into the places where it is to stay.
    """

    @property
    def nbytes(self) -> int:
        """Number of bytes of the whole message."""
        ...

    @property
    def head(self) -> Bytes:
        """The first bytes of the message, at least its prefix and its header."""
        ...

    def read(self, begin: int, places: Iterable[Bytes], note: Callable[[Bytes], object]) -> None:
        """Copy the bytes from ``begin`` on into some places, one place after the other.

        Nothing writes to them any more when this returns or raises.

        Args:
            begin: Number of bytes of the message before the first place.
            places: Rows of bytes to fill.
            note: Called with all that was copied, in order.

        Raises:
            TransferError: The message was released or lost.
        """
        ...


@dataclass(frozen=True, eq=False)
class Message:
    """The bytes of a message: those of its pieces, one after the other.

    The message itself is read-only, and nobody may write to its pieces by another way.
    """

    pieces: tuple[Bytes, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(map(_read_only, self.pieces)))

    @property
    def nbytes(self) -> int:
        """Number of bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def head(self) -> Bytes:
        """The first piece; see :class:`Arrival`."""
        return self.pieces[0]

    def read(self, begin: int, places: Iterable[Bytes], note: Callable[[Bytes], object]) -> None:
        """Copy the bytes from ``begin`` on into some places; see :class:`Arrival`."""
        pieces = self._covered(begin, self.nbytes)
        source = self.pieces[0][:0]
        for place in places:
            done = 0
            while done < len(place):
                source = source if len(source) else next(pieces)
                size = min(len(place) - done, len(source), COPIED_AT_ONCE)
                target = place[done : done + size]
                target[:] = source[:size]
                note(target)
                source, done = source[size:], done + size

    def flat(self) -> Bytes:
        """Copy all bytes into one array."""
        return np.concatenate(self.pieces)

    def owned(self) -> Message:
        """The same message with memory of its own."""
        return Message((self.flat(),))

    def check_pieces(self) -> None:
        """Raise :class:`WireError` unless every piece is one row of bytes."""
        for piece in self.pieces or (None,):
            if not (
                isinstance(piece, np.ndarray)
                and piece.dtype == np.uint8
                and piece.ndim == 1
                and piece.flags.c_contiguous
            ):
                raise WireError(
                    f"a KV message is rows of bytes, got {type(piece).__name__}; prefill again"
                )

    def rows(self, begin: int, size: int) -> torch.Tensor:
        """Some of the bytes as uint8 rows ``(pieces, bytes)``, without a copy; read-only.

        Raises:
            WireError: They begin or end within a piece that others share with them.
        """
        covered = list(self._covered(begin, begin + size))
        sizes = {len(part) for part in covered}
        if not size:
            return torch.empty((1, 0), dtype=torch.uint8)
        if len(sizes) != 1 or len(covered) * sizes.pop() != size:
            raise WireError(
                f"bytes {begin} to {begin + size} of the KV message lie in pieces of unequal "
                "sizes; prefill again"
            )
        return _shared(covered)

    def _covered(self, begin: int, end: int) -> Iterator[Bytes]:
        """The parts of pieces that hold the bytes from ``begin`` to ``end``."""
        ends = accumulate(piece.nbytes for piece in self.pieces)
        for piece, stop in zip(self.pieces, ends, strict=True):
            start = stop - piece.nbytes
            if start < end and begin < stop:
                yield piece[max(0, begin - start) : min(piece.nbytes, end - start)]


def pieces_of(tensor: torch.Tensor) -> list[Bytes]:
    """The bytes of a tensor in order, as views where its memory allows, else copied.

    Args:
        tensor: A tensor of any device; one that is contiguous, or whose first dimension alone is
            strided, is not copied on a CPU.
    """
    tensor = tensor.cpu()
    if not tensor.numel():
        return []
    rows = [tensor]
    if not tensor.is_contiguous():
        rows = list(tensor) if tensor[0].is_contiguous() else [tensor.contiguous()]
    return [row.reshape(-1).view(torch.uint8).numpy() for row in rows]


def _read_only(piece: Bytes) -> Bytes:
    if not isinstance(piece, np.ndarray):
        return piece  # It is refused when it is read.
    view = piece.view()
    view.flags.writeable = False
    return view


class _Shared:
    """Memory of arrays as rows, without their read-only flag, about which torch would warn.

    It keeps the arrays alive.
    """

    def __init__(self, arrays: Sequence[Bytes], stride: int) -> None:
        self.arrays = tuple(arrays)
        interface: dict[str, Any] = dict(arrays[0].__array_interface__)
        self.__array_interface__ = {
            **interface,
            "data": (interface["data"][0], False),
            "shape": (len(arrays), len(arrays[0])),
            "strides": (stride, 1),
        }


def _shared(arrays: Sequence[Bytes]) -> torch.Tensor:
    """View arrays of equal length as the rows of one tensor; nobody may write to it.

    They are copied only if they do not lie at equal distances.
    """
    at = [array.__array_interface__["data"][0] for array in arrays]
    steps = {after - before for before, after in pairwise(at)} or {len(arrays[0])}
    stride = steps.pop()
    if steps or stride < 0:
        return torch.from_numpy(np.stack(list(arrays)))
    return torch.from_numpy(np.asarray(_Shared(arrays, stride)))
