"""Levels of a block's KV: from a short cut in the smallest encoding to everything as it is.

A set of levels, one per block where decode attends, is one choice of the KV that travels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rayapp.plan import Encoding, KVTransfer
from rayapp.pruning.kv_choice.bytes import KVBytes

ENCODINGS: dict[Encoding, tuple[Encoding, ...]] = {
    "model": ("model",),
    "int8": ("int8", "model"),
    "int4": ("int4", "int8", "model"),
}
"""The encodings to choose from, smallest first, by the smallest encoding that is allowed."""

KVSet = tuple[int, ...]
"""A level for every block of a :class:`KVLevels`, in its order."""


@dataclass(frozen=True)
class KVLevels:
    """The levels of every block where decode attends, by bytes; the first is the smallest.

    The last level of a block sends all in the model's own type.
    """

    blocks: tuple[int, ...]
    levels: tuple[tuple[KVTransfer, ...], ...]

    @classmethod
    def of(
        cls,
        blocks: Sequence[int],
        num_bytes: KVBytes,
        *,
        cuts: Sequence[KVTransfer],
        smallest: Encoding = "model",
    ) -> KVLevels:
        """Every cut and no cut in every allowed encoding, without the rules that save nothing.

        Args:
            blocks: Blocks where decode attends.
            num_bytes: Gives the bytes of rules on the calibration set.
            cuts: Which entries a block may keep, where it does not keep all.
            smallest: The smallest encoding allowed.
        """
        rules = [
            cut.model_copy(update={"encoding": encoding})
            for encoding in ENCODINGS[smallest]
            for cut in (*cuts, KVTransfer())
        ]
        return cls(tuple(blocks), tuple(_by_bytes(block, rules, num_bytes) for block in blocks))

    @property
    def smallest(self) -> KVSet:
        """The set with every block cut as far as it goes."""
        return (0,) * len(self.blocks)

    @property
    def full(self) -> KVSet:
        """The set with nothing cut and nothing encoded: the block plan as it is."""
        return tuple(len(levels) - 1 for levels in self.levels)

    @property
    def size(self) -> int:
        """Number of sets."""
        return math.prod(len(levels) for levels in self.levels)

    def rules(self, chosen: KVSet) -> Mapping[int, KVTransfer]:
        """Transfer rules of a set, by block."""
        triples = zip(self.blocks, self.levels, chosen, strict=True)
        return {block: levels[level] for block, levels, level in triples}

    def moves(self, chosen: KVSet) -> Iterator[KVSet]:
        """All sets that differ from one in one block."""
        for index, levels in enumerate(self.levels):
            for level in range(len(levels)):
                if level != chosen[index]:
                    yield moved(chosen, index, level)


def moved(chosen: KVSet, index: int, level: int) -> KVSet:
    """A set with another level in one place."""
    return (*chosen[:index], level, *chosen[index + 1 :])


def _by_bytes(
    block: int, rules: Sequence[KVTransfer], num_bytes: KVBytes
) -> tuple[KVTransfer, ...]:
    """Rules in ascending order of bytes.

    Of rules with equal bytes the most exact one stays, and none that is as large as all KV.
    """
    uncut = num_bytes.sent({})
    by_size: dict[int, KVTransfer] = {}
    for rule in rules:
        by_size[num_bytes.sent({block: rule})] = rule  # later rules are more exact, or longer
    kept = {size: rule for size, rule in by_size.items() if size < uncut}
    return (*(kept[size] for size in sorted(kept)), KVTransfer())
