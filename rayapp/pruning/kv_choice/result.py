"""The outcome of a selection of KV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayapp.plan import PLAN_FILE, KVTransfer, PruningPlan
from rayapp.pruning.kv_choice.elimination import Step
from rayapp.pruning.measures.attention_mass import BlockMass


@dataclass(frozen=True)
class BlockChoice:
    """One block's measurements and the rule that it sends by.

    Attributes:
        block: The block's number.
        mass: The share of its attention on first and last entries.
        cut_alone: Score with this block alone cut to its smallest level.
        kept_alone: Score with this block alone uncut, and every other at its smallest level.
        rule: The chosen transfer rule.
    """

    block: int
    mass: BlockMass
    cut_alone: float
    kept_alone: float
    rule: KVTransfer


@dataclass(frozen=True)
class KVSelection:
    """The outcome of a selection.

    Attributes:
        plan: The plan with its transfer rules.
        blocks: Every block where decode attends.
        score: The plan's score on the calibration set.
        base_score: The score with all KV sent as it is.
        cut_score: The score with every block at its smallest level.
        bytes_full: Bytes of the dense caches of the calibration prompts.
        bytes_sent: Bytes of the KV that the plan sends of these prompts, headers included.
        steps: The steps of the search.
        evaluations: Number of sets scored, those of earlier selections included.
        seconds: Wall time.
    """

    plan: PruningPlan
    blocks: tuple[BlockChoice, ...]
    score: float
    base_score: float
    cut_score: float
    bytes_full: int
    bytes_sent: int
    steps: tuple[Step, ...]
    evaluations: int
    seconds: float

    @property
    def reduction(self) -> float:
        """Ratio of dense bytes to sent bytes: ``bytes_full / bytes_sent``."""
        return self.bytes_full / self.bytes_sent

    def record(self) -> dict[str, Any]:
        """The selection as JSON: its choice, score and bytes, and every block's measurements."""
        return {
            "kv_transfer": plain_rules(self.plan.kv_transfer),
            "score": self.score,
            "score_all_sent": self.base_score,
            "score_all_cut": self.cut_score,
            "bytes_full": self.bytes_full,
            "bytes_sent": self.bytes_sent,
            "reduction": self.reduction,
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 3),
            "blocks": [
                {
                    "block": choice.block,
                    "mass": choice.mass.kept,
                    "cut_alone": choice.cut_alone,
                    "kept_alone": choice.kept_alone,
                    "rule": _plain(choice.rule),
                }
                for choice in self.blocks
            ],
        }

    def summary(self, out: str) -> str:
        """The selection in one line for people."""
        return (
            f"{out}/{PLAN_FILE}: {self.reduction:.2f}x fewer bytes, score {self.score:.5g} "
            f"({self.base_score:.5g} with all KV), {self.evaluations} sets in {self.seconds:.1f} s"
        )


def plain_rules(rules: Mapping[int, KVTransfer]) -> dict[str, Any]:
    """Transfer rules as a plan's JSON spells them."""
    return {str(block): _plain(rule) for block, rule in sorted(rules.items())}


def _plain(rule: KVTransfer) -> dict[str, Any]:
    return rule.model_dump(mode="json", exclude_none=True)
