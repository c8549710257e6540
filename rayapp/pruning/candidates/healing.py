"""Healing: which survivors and linear maps take over the work of removed blocks, and their tensors.

Our reading of PDTrim's distillation set (arXiv:2509.04467; project default, since its method
section is not public): a block of that set goes together with a survivor that is trained to do the
work of both. The survivor is the next block, else the one before; it must run in full in that
stage, and belongs to one pair only. If neither neighbour is free the block goes unhealed, and its
real score decides.

Spans of removed blocks may be healed in closed form instead
(:mod:`rayapp.pruning.candidates.fits`). Pairs and fits are the **units** of healing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rayapp.models.healed import HealedWeights
from rayapp.plan import STAGES, Stage
from rayapp.pruning.candidates.candidate import ATTENTION, DENSE, MLP, Candidate
from rayapp.pruning.candidates.fits import Fit, span_fits, spans

PARTS = ATTENTION | MLP
ABSORBS_BEFORE, ABSORBS_AFTER = 4, 8
"""Bits of a survivor, beside those of skipped parts: it does the work of the block before it, or of
the block after it. States that depend on healed tensors thus have keys of their own."""

BRIDGED, BRIDGED_SERVED = 16, 32
"""Bits of the last block of a span that has a bridge, and of one whose bridge was fitted to states
that the healed stage makes."""


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


Unit = Pair | Fit
"""A unit of healing: the survivor of a pair, or one linear map."""


def unit_order(unit: Unit) -> tuple[Any, ...]:
    """Key that puts units of both kinds in one order."""
    return (isinstance(unit, Fit), unit)


@dataclass(frozen=True)
class Healing:
    """The blocks of each stage that are healed when they are removed, if a survivor is free.

    With ``linear``, pairs heal spans of one block only, and all other spans are healed in closed
    form: by fits that read the dense model's states, or with ``served`` (and no pairs) those that
    the healed stage really makes. ``fixed`` are the units of an existing plan; they replace the
    rule.
    """

    num_blocks: int = 0
    prefill: frozenset[int] = frozenset()
    decode: frozenset[int] = frozenset()
    linear: bool = False
    served: bool = False
    first_token: Stage = "prefill"
    fixed: tuple[Unit, ...] = ()

    @classmethod
    def of_all(cls, num_blocks: int) -> Healing:
        """Healing of every removed block by a survivor, if one is free."""
        blocks = frozenset(range(num_blocks))
        return cls(num_blocks, blocks, blocks)

    def blocks(self, stage: Stage) -> frozenset[int]:
        """The blocks of one stage that may be healed."""
        return self.prefill if stage == "prefill" else self.decode

    def units(self, candidate: Candidate) -> tuple[Unit, ...]:
        """The pairs and the fits that a candidate uses."""
        return (*self.pairs(candidate), *self.fits(candidate))

    def pairs(self, candidate: Candidate) -> tuple[Pair, ...]:
        """The pairs that a candidate uses, ascending."""
        return (*self.stage_pairs(candidate, "decode"), *self.stage_pairs(candidate, "prefill"))

    def fits(self, candidate: Candidate) -> tuple[Fit, ...]:
        """The fits that a candidate uses, by stage and block."""
        return tuple(fit for stage in STAGES for fit in self.stage_fits(candidate, stage))

    def stage_fits(self, candidate: Candidate, stage: Stage) -> tuple[Fit, ...]:
        """The fits that a candidate uses in one stage, by block."""
        if self.fixed:
            return tuple(u for u in self.fixed if isinstance(u, Fit) and u.stage == stage)
        if not self.linear or not candidate.parts(stage):
            return ()
        gone = [skipped == PARTS for skipped in candidate.skips(stage, self.num_blocks)]
        reads_kv = [not s & ATTENTION for s in candidate.skips("decode", self.num_blocks)]
        paired = {pair.removed for pair in self.stage_pairs(candidate, stage)}
        ends_unread = stage == "prefill" and self.first_token == "decode"
        return tuple(
            fit
            for first, stop in spans(gone)
            if first not in paired
            for fit in span_fits(
                stage,
                (first, stop),
                reads_kv if stage == "prefill" else [False] * self.num_blocks,
                bridged=stop < self.num_blocks or not ends_unread,
                before=_before(candidate, stage, first) if self.served else DENSE,
            )
        )

    def stage_pairs(self, candidate: Candidate, stage: Stage) -> tuple[Pair, ...]:
        """The pairs that a candidate uses in one stage, ascending.

        Removed blocks choose their survivors in descending order. On a line of blocks this heals as
        many as possible, because the last removed block takes a survivor that only it and earlier
        blocks could use.
        """
        if self.fixed:
            return tuple(u for u in self.fixed if isinstance(u, Pair) and u.stage == stage)
        if not self.blocks(stage):
            return ()
        skips = candidate.skips(stage, self.num_blocks)
        free = {block for block, skipped in enumerate(skips) if not skipped}
        gone = [skipped == PARTS for skipped in skips]
        healed = {b for b in self.blocks(stage) if gone[b]}
        if self.linear:
            healed &= {first for first, stop in spans(gone) if stop == first + 1}
        pairs: list[Pair] = []
        for removed in sorted(healed, reverse=True):
            near = [block for block in (removed + 1, removed - 1) if block in free]
            if near:
                free.remove(near[0])
                pairs.append(Pair(stage, removed, near[0]))
        return tuple(sorted(pairs))

    def num_bridges(self, candidate: Candidate, stage: Stage) -> int:
        """Number of spans of a stage that a linear map stands for."""
        return sum(fit.kind == "bridge" for fit in self.stage_fits(candidate, stage))

    def skips(self, candidate: Candidate, stage: Stage, num_blocks: int) -> tuple[int, ...]:
        """Bits of every block as :meth:`Candidate.skips` gives them, with the marks of healing."""
        skips = list(candidate.skips(stage, num_blocks))
        for pair in self.stage_pairs(candidate, stage):
            skips[pair.survivor] |= pair.mark
        for fit in self.stage_fits(candidate, stage):
            if fit.kind == "bridge":
                skips[fit.block] |= BRIDGED if fit.before == DENSE else BRIDGED_SERVED
        return tuple(skips)


def _before(candidate: Candidate, stage: Stage, block: int) -> Candidate:
    """Everything that is skipped before the state that enters a block.

    States of prefill do not depend on decode, so there decode skips the same: no KV is written.
    """
    parts = tuple(part for part in candidate.parts(stage) if part < 2 * block)
    return Candidate(parts if stage == "prefill" else candidate.prefill, parts)


NO_HEALING = Healing()


@dataclass(frozen=True)
class HealedUnit:
    """A trained pair of blocks, or a solved fit.

    Attributes:
        unit: The pair or the fit.
        tensors: The learnt parameters by canonical name, on the CPU.
        loss_before: Relative mean squared error on judging lines without healing: of the span's
            output, or of the keys and values.
        loss_after: That error with the healed tensors; it is never higher.
    """

    unit: Unit
    tensors: Mapping[str, torch.Tensor]
    loss_before: float
    loss_after: float

    @property
    def weights(self) -> HealedWeights:
        """The tensors as the healed weights of their stage."""
        return HealedWeights.of({self.unit.stage: self.tensors})

    def record(self) -> dict[str, Any]:
        """The unit's blocks and losses, as JSON for a plan's provenance."""
        unit = asdict(self.unit)
        if isinstance(self.unit, Fit):
            unit["before"] = str(self.unit.before)
        return {
            **unit,
            "relative_mse_before": self.loss_before,
            "relative_mse_after": self.loss_after,
        }
