"""Healing: which survivor takes over the work of a removed block, and its trained tensors.

Our reading of PDTrim's distillation set (arXiv:2509.04467; project default, since its method
section is not public): a block of that set goes together with a survivor that is trained to do the
work of both. The survivor is the next block, else the one before; it must run in full in that
stage, and belongs to one pair only. If neither neighbour is free the block goes unhealed, and its
real score decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rayapp.models.healed import HealedWeights
from rayapp.plan import Stage
from rayapp.pruning.candidates.candidate import ATTENTION, MLP, Candidate

PARTS = ATTENTION | MLP
ABSORBS_BEFORE, ABSORBS_AFTER = 4, 8
"""Bits of a survivor, beside those of skipped parts: it does the work of the block before it, or of
the block after it. States that depend on healed tensors thus have keys of their own."""


@dataclass(frozen=True, order=True)
class Pair:
    """A removed block of one stage, and its neighbour that does the work of both."""

    stage: Stage
    removed: int
    survivor: int

    @property
    def first(self) -> int:
        """The block whose input the survivor gets; it comes first in the model."""
        return min(self.removed, self.survivor)

    @property
    def last(self) -> int:
        """The block whose output the survivor is trained to give."""
        return max(self.removed, self.survivor)

    @property
    def mark(self) -> int:
        """The survivor's bit, ``ABSORBS_BEFORE`` or ``ABSORBS_AFTER``."""
        return ABSORBS_BEFORE if self.removed < self.survivor else ABSORBS_AFTER

    @classmethod
    def of_mark(cls, stage: Stage, block: int, mark: int) -> Pair:
        """The pair of a survivor with this bit."""
        return cls(stage, block - 1 if mark & ABSORBS_BEFORE else block + 1, block)

    def __str__(self) -> str:
        return f"{self.stage} {self.removed} into {self.survivor}"


@dataclass(frozen=True)
class Healing:
    """The blocks of each stage that are healed when they are removed, if a survivor is free.

    ``fixed`` are the pairs of an existing plan; they replace the rule.
    """

    num_blocks: int = 0
    prefill: frozenset[int] = frozenset()
    decode: frozenset[int] = frozenset()
    fixed: tuple[Pair, ...] = ()

    @classmethod
    def of_all(cls, num_blocks: int) -> Healing:
        """Healing of every removed block."""
        blocks = frozenset(range(num_blocks))
        return cls(num_blocks, blocks, blocks)

    def blocks(self, stage: Stage) -> frozenset[int]:
        """The blocks of one stage that may be healed."""
        return self.prefill if stage == "prefill" else self.decode

    def pairs(self, candidate: Candidate) -> tuple[Pair, ...]:
        """The pairs that a candidate uses, ascending."""
        return (*self.stage_pairs(candidate, "decode"), *self.stage_pairs(candidate, "prefill"))

    def stage_pairs(self, candidate: Candidate, stage: Stage) -> tuple[Pair, ...]:
        """The pairs that a candidate uses in one stage, ascending.

        Removed blocks choose their survivors in descending order. On a line of blocks this heals as
        many as possible, because the last removed block takes a survivor that only it and earlier
        blocks could use.
        """
        if self.fixed:
            return tuple(pair for pair in self.fixed if pair.stage == stage)
        if not self.blocks(stage):
            return ()
        skips = candidate.skips(stage, self.num_blocks)
        free = {block for block, skipped in enumerate(skips) if not skipped}
        pairs: list[Pair] = []
        for removed in reversed(range(self.num_blocks)):
            if skips[removed] != PARTS or removed not in self.blocks(stage):
                continue
            near = [block for block in (removed + 1, removed - 1) if block in free]
            if near:
                free.remove(near[0])
                pairs.append(Pair(stage, removed, near[0]))
        return tuple(sorted(pairs))

    def skips(self, candidate: Candidate, stage: Stage, num_blocks: int) -> tuple[int, ...]:
        """Bits of every block as :meth:`Candidate.skips` gives them, with the survivors' marks."""
        skips = list(candidate.skips(stage, num_blocks))
        for pair in self.stage_pairs(candidate, stage):
            skips[pair.survivor] |= pair.mark
        return tuple(skips)


NO_HEALING = Healing()


@dataclass(frozen=True)
class HealedPair:
    """A trained pair of blocks.

    Attributes:
        pair: The pair that was trained.
        tensors: The survivor's trained parameters by canonical name, on the CPU.
        loss_before: Relative mean squared error of the span's output on held-back lines, with the
            survivor as it was.
        loss_after: That error with the healed tensors; it is never higher.
    """

    pair: Pair
    tensors: Mapping[str, torch.Tensor]
    loss_before: float
    loss_after: float

    @property
    def weights(self) -> HealedWeights:
        """The survivor's tensors as the healed weights of its stage."""
        return HealedWeights.of({self.pair.stage: self.tensors})

    def record(self) -> dict[str, Any]:
        """The pair's blocks and losses, as JSON for a plan's provenance."""
        return {
            "stage": self.pair.stage,
            "removed": self.pair.removed,
            "survivor": self.pair.survivor,
            "relative_mse_before": self.loss_before,
            "relative_mse_after": self.loss_after,
        }
