"""What a selection of KV found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayapp.plan import PLAN_FILE, KVTransfer, PruningPlan
from rayapp.pruning.kv_choice.elimination import Step
from rayapp.pruning.measures.attention_mass import BlockMass


@dataclass(frozen=True)
class BlockChoice:
    """What was measured of one block, and what it sends.

    Attributes:
        block: Its number.
        mass: Its attention on first and last entries.
        cut_alone: Score where this block alone is cut to its smallest level.
        kept_alone: Score where this block alone is not cut, and every other to its smallest.
        rule: What was chosen.
    """

    block: int
    mass: BlockMass
    cut_alone: float
    kept_alone: float
    rule: KVTransfer


@dataclass(frozen=True)
class KVSelection:
    """What a selection found.

    Attributes:
        plan: The plan with its transfer rules.
        blocks: Every block where decode attends.
        score: Of the plan on the calibration set.
        base_score: The same with all KV sent as it is.
        cut_score: The same with every block at its smallest level.
        bytes_full: What the dense caches of the calibration prompts weigh.
        bytes_sent: What the plan sends of them, headers included.
        steps: The way of the search.
        evaluations: Sets scored, earlier selections included.
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
        """``bytes_full / bytes_sent``."""
        return self.bytes_full / self.bytes_sent

    def record(self) -> dict[str, Any]:
        """As JSON: what was chosen, what it scores and weighs, and every block's measurements."""
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
                    "block": each.block,
                    "mass": each.mass.kept,
                    "cut_alone": each.cut_alone,
                    "kept_alone": each.kept_alone,
                    "rule": _plain(each.rule),
                }
                for each in self.blocks
            ],
        }

    def summary(self, out: str) -> str:
        """What was found, in one line for people."""
        return (
            f"{out}/{PLAN_FILE}: {self.reduction:.2f}x fewer bytes, score {self.score:.5g} "
            f"({self.base_score:.5g} with all KV), {self.evaluations} sets in {self.seconds:.1f} s"
        )


def plain_rules(rules: Mapping[int, KVTransfer]) -> dict[str, Any]:
    """Transfer rules as a plan's JSON spells them."""
    return {str(block): _plain(rule) for block, rule in sorted(rules.items())}


def _plain(rule: KVTransfer) -> dict[str, Any]:
    return rule.model_dump(mode="json", exclude_none=True)
