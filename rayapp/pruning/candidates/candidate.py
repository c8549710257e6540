"""One point of a search: the parts that each stage skips, and the KV that travels.

Candidates are hashable and ordered. The parts of block ``b`` are numbered ``2 b`` (attention) and
``2 b + 1`` (MLP). Which KV a prefill writes follows from where decode attends (EVALUATION: modes
that write KV are derived, never searched), so two candidates that would compute the same are the
same. Most candidates leave the transfer to the objective; those of ``rayapp kv-select`` bring rules
of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from rayapp.plan import (
    SEND_ALL,
    STAGES,
    KVTransfer,
    Mode,
    ModelSignature,
    PruningPlan,
    Stage,
    StagePlan,
    VisualTokens,
)

ATTENTION, MLP = 1, 2
"""Bits of a block's skipped parts, as :meth:`Candidate.skips` gives them."""

_MODES: dict[int, tuple[Mode, Mode]] = {
    0: (Mode.FULL, Mode.FULL),
    ATTENTION: (Mode.MLP_ONLY, Mode.MLP_AND_KV),
    MLP: (Mode.ATTENTION_ONLY, Mode.ATTENTION_ONLY),
    ATTENTION | MLP: (Mode.REMOVED, Mode.KV_ONLY),
}
"""Modes of a block by its skipped parts: if its KV is not needed, and if it is."""


KVRule = tuple[int, str, str, str]
"""One transfer rule: block, first, last and encoding. Counts and shares are spelled in one way only
(``"4"``, ``"0.25"``, ``"all"``), so rules that send the same are equal, sort, and are JSON."""


def kv_rule(block: int, rule: KVTransfer) -> KVRule:
    """A transfer rule in the form that candidates have."""
    first, last = (_spelled(amount) for amount in (rule.first, rule.last))
    if rule.keeps_all or "all" in (first, last):
        first, last = "all", "0"
    return block, first, last, rule.encoding


@lru_cache(maxsize=4096)
def transfer_of(rule: KVRule) -> KVTransfer:
    """The transfer rule that :func:`kv_rule` spelled."""
    _, first, last, encoding = rule
    if first == "all":
        return KVTransfer.model_validate({"encoding": encoding})
    amounts = {"first": json.loads(first), "last": json.loads(last)}
    return KVTransfer.model_validate({**amounts, "encoding": encoding})


def _spelled(amount: int | float | None) -> str:
    if not amount:
        return "0"
    return "all" if isinstance(amount, float) and amount == 1 else repr(amount)


@dataclass(frozen=True, order=True)
class Candidate:
    """Parts that each stage skips, ascending. The order of candidates breaks ties of scores.

    ``kv`` holds the candidate's own transfer rules, one per block and ascending: they replace those
    of the objective in all blocks. If ``kv`` is empty, the objective's rules apply.
    """

    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    kv: tuple[KVRule, ...] = ()

    def parts(self, stage: Stage) -> tuple[int, ...]:
        """The skipped parts of one stage."""
        return self.prefill if stage == "prefill" else self.decode

    def removed(self, stage: Stage) -> float:
        """Number of blocks removed from one stage; each part counts one half."""
        return len(self.parts(stage)) / 2

    def skips(self, stage: Stage, num_blocks: int) -> tuple[int, ...]:
        """Bits of the skipped parts, block by block: 0, ``ATTENTION``, ``MLP`` or both."""
        bits = [0] * num_blocks
        for part in self.parts(stage):
            bits[part // 2] |= MLP if part % 2 else ATTENTION
        return tuple(bits)

    def with_kv(self, rules: Mapping[int, KVTransfer]) -> Candidate:
        """The same parts with transfer rules; a rule that sends all that is read is left out."""
        unread = {part // 2 for part in self.decode if not part % 2}
        spelled = (kv_rule(block, rules[block]) for block in sorted(rules) if block not in unread)
        return replace(self, kv=tuple(rule for rule in spelled if rule[1:] != SEND_ALL_RULE))

    def transfers(self, default: Mapping[int, KVTransfer]) -> Mapping[int, KVTransfer]:
        """Transfer rules by block: the candidate's own, or ``default`` if it has none."""
        return {rule[0]: transfer_of(rule) for rule in self.kv} if self.kv else default

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
        visual_tokens: VisualTokens | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """The plan that serves this candidate; transfer rules of blocks without KV are dropped.

        ``kv_transfer`` applies if the candidate has no rules of its own.
        """
        skips = self.skips("decode", model.num_blocks)
        wanted = self.transfers(kv_transfer or {})
        rules = {b: rule for b, rule in wanted.items() if not skips[b] & ATTENTION}
        return PruningPlan(
            model=model,
            first_token=first_token,
            prefill=StagePlan(blocks=self.modes("prefill")),
            decode=StagePlan(blocks=self.modes("decode")),
            kv_transfer=rules,
            visual_tokens=visual_tokens,
            provenance=dict(provenance or {}),
        )

    @classmethod
    def from_plan(cls, plan: PruningPlan) -> Candidate:
        """The candidate that a plan computes; KV that decode never reads makes no difference."""
        return cls(_parts(plan.prefill), _parts(plan.decode)).with_kv(plan.kv_transfer)

    def labels(self, stage: Stage) -> list[str]:
        """Skipped units for people: ``"3"`` for a whole block, ``"3.attention"`` or ``"3.mlp"``."""
        blocks = 1 + max((part // 2 for part in self.parts(stage)), default=-1)
        names = {ATTENTION: ".attention", MLP: ".mlp", ATTENTION | MLP: ""}
        return [f"{b}{names[bits]}" for b, bits in enumerate(self.skips(stage, blocks)) if bits]

    def kv_labels(self) -> list[str]:
        """Transfer rules for people: ``"3:4+0.25"`` for first and last, ``"5:all int8"``."""
        return [
            f"{block}:{first if first == 'all' else f'{first}+{last}'}"
            + f" {encoding}" * (encoding != "model")
            for block, first, last, encoding in self.kv
        ]

    def __str__(self) -> str:
        stages = " ".join(f"{stage}[{' '.join(self.labels(stage))}]" for stage in STAGES)
        return stages + f" kv[{', '.join(self.kv_labels())}]" * bool(self.kv)


DENSE = Candidate()
SEND_ALL_RULE = kv_rule(0, SEND_ALL)[1:]
"""A transfer rule without its block, which sends all entries in the model's own type."""


def _parts(stage: StagePlan) -> tuple[int, ...]:
    parts = []
    for block, mode in sorted(stage.blocks.items()):
        parts += [2 * block] * (not mode.attends) + [2 * block + 1] * (not mode.has_mlp)
    return tuple(parts)
