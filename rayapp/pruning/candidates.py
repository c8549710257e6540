"""One point of a search: which parts each stage skips. Plain data, hashable, ordered.

The parts of block ``b`` are numbered ``2 b`` (attention) and ``2 b + 1`` (MLP). Which KV a prefill
writes follows from where decode attends (EVALUATION: modes that write KV are derived, never
searched), so two candidates that would compute the same are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayapp.plan import STAGES, KVTransfer, Mode, ModelSignature, PruningPlan, Stage, StagePlan

ATTENTION, MLP = 1, 2
"""Bits of a block's skipped parts, as :meth:`Candidate.skips` gives them."""

_MODES: dict[int, tuple[Mode, Mode]] = {
    0: (Mode.FULL, Mode.FULL),
    ATTENTION: (Mode.MLP_ONLY, Mode.MLP_AND_KV),
    MLP: (Mode.ATTENTION_ONLY, Mode.ATTENTION_ONLY),
    ATTENTION | MLP: (Mode.REMOVED, Mode.KV_ONLY),
}
"""Skipped parts to mode: where no KV is needed, and where it is."""


@dataclass(frozen=True, order=True)
class Candidate:
    """Parts that each stage skips, ascending. The order of candidates breaks ties of scores."""

    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()

    def parts(self, stage: Stage) -> tuple[int, ...]:
        """The skipped parts of one stage."""
        return self.prefill if stage == "prefill" else self.decode

    def removed(self, stage: Stage) -> float:
        """Blocks removed from one stage; each part counts one half."""
        return len(self.parts(stage)) / 2

    def skips(self, stage: Stage, num_blocks: int) -> tuple[int, ...]:
        """Per block the bits of its skipped parts: 0, ``ATTENTION``, ``MLP`` or both."""
        bits = [0] * num_blocks
        for part in self.parts(stage):
            bits[part // 2] |= MLP if part % 2 else ATTENTION
        return tuple(bits)

    def modes(self, stage: Stage) -> dict[int, Mode]:
        """Modes of the blocks that ``stage`` does not run in full, by block."""
        blocks = 1 + max((part // 2 for part in (*self.prefill, *self.decode)), default=-1)
        decode = self.skips("decode", blocks)
        skips = decode if stage == "decode" else self.skips("prefill", blocks)
        return {
            block: _MODES[bits][stage == "prefill" and not decode[block] & ATTENTION]
            for block, bits in enumerate(skips)
            if bits
        }

    def plan(
        self,
        model: ModelSignature,
        *,
        first_token: Stage = "prefill",
        kv_transfer: Mapping[int, KVTransfer] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """The plan that serves this candidate; transfer rules of blocks without KV are dropped."""
        skips = self.skips("decode", model.num_blocks)
        rules = {b: rule for b, rule in (kv_transfer or {}).items() if not skips[b] & ATTENTION}
        return PruningPlan(
            model=model,
            first_token=first_token,
            prefill=StagePlan(blocks=self.modes("prefill")),
            decode=StagePlan(blocks=self.modes("decode")),
            kv_transfer=rules,
            provenance=dict(provenance or {}),
        )

    @classmethod
    def from_plan(cls, plan: PruningPlan) -> Candidate:
        """The candidate that a plan's modes compute; KV that decode never reads is no matter."""
        return cls(_parts(plan.prefill), _parts(plan.decode))

    def labels(self, stage: Stage) -> list[str]:
        """Skipped units for people: ``"3"`` for a whole block, ``"3.attention"`` or ``"3.mlp"``."""
        blocks = 1 + max((part // 2 for part in self.parts(stage)), default=-1)
        names = {ATTENTION: ".attention", MLP: ".mlp", ATTENTION | MLP: ""}
        return [f"{b}{names[bits]}" for b, bits in enumerate(self.skips(stage, blocks)) if bits]

    def __str__(self) -> str:
        return " ".join(f"{stage}[{' '.join(self.labels(stage))}]" for stage in STAGES)


DENSE = Candidate()


def _parts(stage: StagePlan) -> tuple[int, ...]:
    parts = []
    for block, mode in sorted(stage.blocks.items()):
        parts += [2 * block] * (not mode.attends) + [2 * block + 1] * (not mode.has_mlp)
    return tuple(parts)
